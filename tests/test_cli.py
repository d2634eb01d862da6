"""The command line: exit status, one message a mistake, and nothing written that was not asked for."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

import harness.answering
from harness import overrides
from harness.executors import worker
from harness.given import Given
from harness.lock import only_writer
from kvmerge.errors import UserError
from kvmerge.places import choices
from tests.conftest import Output
from tests.tiny_run import read_lines

ROOT = Path(__file__).resolve().parents[1]

Command = Callable[..., Output]


def process(folder: Path, *arguments: str) -> Output:
    """`python run.py` as a person starts it, in an empty folder."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *arguments],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return Output(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def given(checkpoint: Path, data: Path, tmp_path: Path) -> list[str]:
    """Arguments of a run that works."""
    return [
        f"model.path={checkpoint}",
        "benchmark=longbench",
        f"benchmark.data_dir={data}",
        "benchmark.tasks=[trec]",
        f"output_dir={tmp_path / 'out'}",
        "limit=1",
    ]


def assert_refused(output: Output, *parts: str) -> None:
    """Status 2, nothing on stdout, one message that holds `parts`, and no traceback."""
    assert output.status == 2, output
    assert output.out == ""
    assert "Traceback" not in output.err
    assert 'File "' not in output.err
    for part in parts:
        assert output.err.count(part) == 1, output.err


# as a person starts it


def test_as_a_process_a_mistake_prints_one_message_and_gives_status_2(tmp_path: Path) -> None:
    output = process(tmp_path, "method=kvmergr")
    assert_refused(output, "error: unknown method 'kvmergr'. Did you mean 'kvmerger'?")
    loading, _ = output.err.splitlines()
    assert loading == "kvmerge: loading torch and transformers"
    assert list(tmp_path.iterdir()) == []


# what is shown


def test_a_run_shows_its_table_and_names_its_files(
    command: Command, given: list[str], tmp_path: Path
) -> None:
    output = command(*given, "cells=[full@1,kvmerger@0.5]")
    assert output.status == 0, output.err
    assert "Traceback" not in output.err
    for part in ("kvmerger", "@0.5", "trec", "average", "achieved budget", "KL to full"):
        assert part in output.out
    named = [line.strip() for line in output.out.splitlines() if str(tmp_path) in line]
    assert {Path(name).name for name in named} == {
        "summary.csv",
        "run.json",
        "predictions",
        "tables",
        "plots",
        "report.html",
    }
    assert all(Path(name).exists() for name in named)
    assert len(read_lines(tmp_path / "out")) == 2
    assert set(tmp_path.iterdir()) == {tmp_path / "out", Path.cwd()}
    assert list(Path.cwd().iterdir()) == []


def test_a_second_command_adds_its_cell_to_the_table_of_the_first(
    command: Command, undrawn: None, given: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    free = [text for text in given if not text.startswith(("output_dir", "limit"))]
    first = command(*free, "method=kvmerger", "budget=0.35", "limit=2")
    assert first.status == 0, first.err
    (run,) = Path("results/runs/cells/longbench").iterdir()
    full = run / "predictions" / "trec" / "full@1.jsonl"
    before = full.read_bytes()
    ran: list[str] = []
    original = harness.answering.run_samples

    def watched(model: Any, requests: Any, stop: Any) -> Any:
        ran.extend(row.cell for each in requests for row in each.rows)
        return original(model, requests, stop)

    monkeypatch.setattr(harness.answering, "run_samples", watched)
    second = command(*free, "method=h2o", "budget=0.35", "limit=2")
    assert second.status == 0, second.err
    assert [name for name in ran if name] == ["h2o@0.35"] * 2
    assert full.read_bytes() == before
    header = next(line.split() for line in second.out.splitlines() if "full" in line)
    assert header == ["full", "kvmerger", "h2o"]
    for figure in ("difference", "KL to full"):
        assert figure in first.out
        assert figure in second.out
    kl = next(line.split() for line in second.out.splitlines() if "KL to full" in line)
    assert len(kl) == len(["KL", "to", "full", "(nats)", "full@1", "kvmerger@0.35", "h2o@0.35"])

    third = command(*free, "method=h2o", "budget=0.5", "limit=3")
    header = next(line.split() for line in third.out.splitlines() if "full" in line)
    assert header == ["full", "h2o"]
    told = " ".join(third.out.split())
    assert "kvmerger@0.35, h2o@0.35 on trec (2 of 3)" in told


def test_help_names_the_commands_the_choices_and_the_settings(command: Command) -> None:
    output = command("--help")
    assert output.status == 0
    for part in (
        "python run.py method=kvmerger budget=0.35",
        "python run.py experiment=mini",
        "dry_run=true",
        "output_dir",
        "make report",
        *choices("method"),
        *choices("model"),
        *choices("benchmark"),
        *choices("experiment"),
    ):
        assert part in output.out
    assert "_base" not in output.out
    assert list(Path.cwd().iterdir()) == []


def test_help_says_of_each_setting_what_it_may_hold(command: Command) -> None:
    out = command("model=llama2-7b-chat", "method=kvmerger_log", "benchmark=needle", "--help").out
    for name, kind in get_type_hints(Given).items():
        if name not in ("model", "benchmark", "method", "executor"):
            (line,) = re.findall(rf"^  {name}:.*", out, re.MULTILINE)
            assert [word for word in get_args(kind) if isinstance(word, str) and word not in line] == []
    assert "model.*, of model=llama2-7b-chat:" in out
    assert re.search(r"  quantize: null +# null \| 8bit .*\| 4bit", out)
    # of the file that this one starts from, and its own
    assert re.search(r"  linkage: anchor +# anchor \(the paper's Figure 4\) \| complete", out)
    assert "  attn_bias: log_size" in out
    assert re.search(r"  source: stdlib +# stdlib \(.*\| packages .*\| the path of", out)


# mistakes


@pytest.mark.parametrize(
    ("group", "name", "near"),
    [
        ("method", "kvmergr", "kvmerger"),
        ("model", "llama2-7b-caht", "llama2-7b-chat"),
        ("benchmark", "longbenhc", "longbench"),
        ("experiment", "paper-longbench", "paper_longbench"),
    ],
)
def test_an_unknown_choice_is_answered_with_the_nearest_and_all(
    command: Command, group: str, name: str, near: str
) -> None:
    output = command(f"{group}={name}")
    assert_refused(output, f"error: unknown {group} '{name}'. Did you mean '{near}'? Available: ")
    assert output.err.rstrip(".\n").endswith(", ".join(choices(group)))


@pytest.mark.parametrize("group", overrides.GROUPS)
@pytest.mark.parametrize("name", ["null", "", "none"])
def test_a_choice_cannot_be_left_empty(command: Command, group: str, name: str) -> None:
    assert_refused(command(f"{group}={name}"), f"unknown {group} '{name}'")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["benchmark.tasks=[trek]"], ["unknown LongBench task 'trek'. Did you mean 'trec'?"]),
        (["budget=0"], ["error: budget=0 is out of range", "(0, 1]", "2 or more"]),
        (["budget=-3"], ["error: budget=-3 is out of range"]),
        (["budget=1.5"], ["error: budget=1.5 is out of range"]),
        (["budget=nan"], ["error: budget=nan is out of range"]),
        (["budget=abc"], ["error: budget='abc' is not a number"]),
        (["method=full", "budget=0.5"], ["full@0.5: the full cache keeps everything"]),
        (["method.sigma=-1"], ["error: sigma=-1"]),
        (["cells=[h2o]"], ["cannot read the cell 'h2o'"]),
        (["foo=1"], ["error: unknown setting 'foo'. Available: "]),
        (["methd=h2o"], ["error: unknown setting 'methd'. Did you mean 'method'?"]),
        (["+limits=1"], ["error: unknown setting 'limits'. Did you mean 'limit'?"]),
        (["model.foo=1"], ["error: unknown setting of model 'foo'."]),
        (["model.nmae=x"], ["error: unknown setting of model 'nmae'. Did you mean 'name'?"]),
        (["budget="], ["error: budget=''"]),
        (["budget"], ["budget"]),
        (["cells=[kvmerger:sigma=3@0.5]"], ["error: cells=", "'kvmerger:sigma=3@0.35'"]),
        (["cells=[full@1"], ["error: cannot read cells=[full@1: "]),
        (["seed=${nope}"], ["error: seed cannot be used: "]),
        (["seed=???"], ["error: seed cannot be used: "]),
        (["~seed"], ["error: ~seed: a setting cannot be taken away"]),
        (["dry_run=yep"], ["error: dry_run='yep' must be true or false."]),
        (["hydra.job.chdir=true"], ["error: hydra.job.chdir=true: this setting of Hydra is fixed"]),
        (["limit=0"], ["error: limit=0 must be"]),
        (["model.dtype=fp16"], ["error: unknown dtype 'fp16'. Did you mean 'float16'?"]),
        (["decode_policy=keep"], ["error: unknown decode_policy 'keep'"]),
        (["cells=[full@1]", "budget=0.5"], ["budget cannot be given as well"]),
        (["experiment=paper_longbench", "method=h2o"], ["method cannot be given as well"]),
        (["experiment=paper_longbench", "method.sigma=2"], ["method.sigma cannot be given"]),
    ],
)
def test_a_mistake_is_told_without_a_traceback_and_nothing_is_written(
    command: Command, given: list[str], tmp_path: Path, arguments: list[str], parts: list[str]
) -> None:
    chosen = {text.partition("=")[0] for text in arguments}
    rest = [text for text in given if text.partition("=")[0] not in chosen]
    before = sorted(tmp_path.rglob("*"))
    assert_refused(command(*rest, *arguments), *parts)
    assert sorted(tmp_path.rglob("*")) == before


def test_missing_data_and_weights_are_told(command: Command, given: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "nothing"
    assert_refused(command(*given, f"benchmark.data_dir={folder}"), f"{folder} is not a folder")
    folder.mkdir()
    (folder / "qasper.jsonl").touch()
    missing = command(*given, f"benchmark.data_dir={folder}")
    assert_refused(missing, f"{folder} has no trec.jsonl", "benchmark.tasks=[qasper]")
    weights = command(*given, f"model.path={tmp_path / 'weights'}")
    assert_refused(weights, "error: ", "weights is not a directory with a checkpoint")
    right = command(*given, "method=h2o", "num_shards=2")
    assert right.status == 0, "a run that never began must not stand in the way"


@pytest.mark.parametrize(
    ("argument", "why"),
    [
        ("method=h2o,kvmergr", "unknown method 'kvmergr'"),
        ("experiment=mni", "unknown experiment 'mni'. Did you mean 'mini'"),
    ],
)
def test_choices_are_checked_before_anything_is_composed(argument: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        overrides.read_overrides(["-m", "limit=1", argument])


def test_choices_that_exist_pass() -> None:
    every = [f"{group}={name}" for group in overrides.GROUPS for name in choices(group)]
    overrides.read_overrides([*every, "method=h2o,cam", "budget=0.5", "-m", "--help", "model.path=x"])


# what is promised


def test_a_dry_run_prints_the_plan_and_touches_nothing(
    command: Command, given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "load", lambda *_: pytest.fail("the model was loaded"))
    before = sorted(tmp_path.rglob("*"))
    output = command(*given, "dry_run=true", "cells=[full@1,h2o@0.5]")
    assert output.status == 0
    assert output.err == ""
    for part in ("trec", "full@1, h2o@0.5", str(tmp_path / "out"), "TFLOP"):
        assert part in output.out
    assert sorted(tmp_path.rglob("*")) == before


def test_a_shard_says_what_to_do_next(command: Command, given: list[str], tmp_path: Path) -> None:
    output = command(*given, "method=h2o", "num_shards=2")
    assert output.status == 0
    assert f"make report DIRS={tmp_path / 'out'}" in output.out
    assert not (tmp_path / "out" / "summary.csv").exists()


def test_resuming_with_another_setting_is_refused(
    command: Command, given: list[str], tmp_path: Path
) -> None:
    assert command(*given, "method=h2o", "num_shards=2").status == 0
    refused = command(*given, "method=h2o", "num_shards=2", "seed=1")
    assert_refused(refused, "error: ", "another seed: 0 then, 1 now", "another output_dir")


def test_an_interrupt_is_no_error_and_keeps_what_is_finished(
    command: Command, given: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(harness.answering, "run_samples", interrupted)
    output = command(*given, "method=h2o", "num_shards=2")
    assert output.status == 130
    assert "the same command resumes" in output.err
    assert "Traceback" not in output.err


STOPS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


@pytest.mark.parametrize(("number", "status"), STOPS)
@pytest.mark.parametrize("times", [1, 2])
def test_a_signal_lets_the_samples_at_hand_finish_and_a_second_ends_the_run_at_once(
    command: Command,
    given: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: signal.Signals,
    status: int,
    times: int,
) -> None:
    before = signal.getsignal(number)
    honest = harness.answering.run_samples

    def signalled(model: Any, requests: Any, stop: Any) -> Any:
        for _ in range(times):
            signal.raise_signal(number)
        return honest(model, requests, stop)

    monkeypatch.setattr(harness.answering, "run_samples", signalled)
    more = [text for text in given if text != "limit=1"]
    output = command(*more, "cells=[full@1,h2o@0.5]", "batch_size=2")
    assert output.status == status
    assert f"{number.name}: finishing the samples at hand; once more ends it at once" in caplog.messages
    assert "the same command resumes" in output.err
    assert "Traceback" not in output.err
    assert signal.getsignal(number) == before
    finished = {key[3] for key in read_lines(tmp_path / "out")}
    assert finished == ({"trec-0", "trec-1"} if times == 1 else set())


def test_a_run_into_a_folder_that_another_writes_is_refused(
    command: Command, given: list[str], tmp_path: Path
) -> None:
    with only_writer(tmp_path / "out"):
        assert_refused(command(*given, "method=h2o"), "error: ", f"by process {os.getpid()} on ")


def test_a_run_removes_what_a_killed_one_had_begun(
    command: Command, undrawn: None, given: list[str], tmp_path: Path
) -> None:
    left = tmp_path / "out" / "tables" / f".scores.md.{2**22 + 1}"
    left.parent.mkdir(parents=True)
    left.touch()
    assert command(*given, "method=h2o").status == 0
    assert list((tmp_path / "out").rglob(".*")) == []


def test_a_bad_point_of_a_sweep_stops_no_other_and_is_listed_at_the_end(
    command: Command, given: list[str], tmp_path: Path
) -> None:
    free = [text for text in given if not text.startswith(("output_dir", "limit"))]
    folder = f"output_dir={tmp_path}/first-${{limit}}"
    output = command("-m", *free, "method=h2o", "limit=0,1", "num_shards=2", folder)
    assert output.status == 2
    assert "Traceback" not in output.err
    *_, summary, point = output.err.splitlines()
    assert summary == "error: 1 of the points failed; the others are done."
    assert "limit=0" in point
    assert point.endswith("limit=0 must be a whole number of 1 or more or null.")
    assert len(list(tmp_path.glob("first-1/shards/*/predictions/*/h2o*.jsonl"))) == 1


def test_a_sweep_ends_with_one_report_of_the_points_that_finished(
    command: Command, undrawn: None, given: list[str]
) -> None:
    free = [text for text in given if not text.startswith("output_dir")]
    output = command("-m", *free, "method=h2o,tova", "budget=0.5,-1")
    assert output.status == 2
    *_, page = output.out.splitlines()
    (run,) = Path("results/runs/cells/longbench").iterdir()
    assert page == f"all points together: {run / 'report.html'}"
    assert output.err.count("error: 2 of the points failed; the others are done.") == 1
    summary = (run / "summary.csv").read_text()
    assert all(f",{method}," in summary for method in ("full", "h2o", "tova"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_disk_that_cannot_be_written_is_told_wherever_it_happens(
    command: Command, given: list[str], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refused(file: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refused)
    output = command(*given, "method=h2o", "num_shards=2")
    assert_refused(output, f"error: {os.strerror(number)}", "the same command resumes")


def test_a_fault_of_the_program_keeps_its_traceback(
    command: Command, given: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a fault")

    monkeypatch.setattr(worker, "load", broken)
    with pytest.raises(RuntimeError, match="a fault"):  # Python prints it, and leaves with 1
        command(*given, "method=h2o", "num_shards=2")
