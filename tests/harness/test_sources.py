"""Runs with parts of the user's own: from folders, entry points, and classes that are named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import code
from harness.report.page import main as report
from harness.settings import compose
from kvmerge.errors import UserError
from kvmerge.places import FOLDERS
from tests.conftest import Output
from tests.own_parts import CONFIGS, MODULES, importable, install, write
from tests.tiny_run import read_lines

Command = Callable[..., Output]
SHARD = ("num_shards=2", "limit=2")
"""A run that draws no report."""
SUMS = ("model=tiny-random", "benchmark=sums", *SHARD)


@pytest.fixture
def parts(tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, with modules and a folder `mine` of choices."""
    folder = tmp_path / "cwd"
    write(folder, MODULES)
    write(folder / "mine", CONFIGS)
    monkeypatch.syspath_prepend(folder)
    forget()
    with importable():
        yield folder
    forget()


def forget() -> None:
    """Look at files again."""
    for each in (code._path, code._imports, code._own_folder):
        each.cache_clear()


def run_json(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return found


def test_an_experiment_of_ones_own_runs_and_is_reported_when_its_method_is_gone(
    command: Command, parts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ran = command("--config-dir", "mine", "experiment=mine", f"output_dir={out}")
    assert ran.status == 0, ran.err
    info = run_json(out)
    assert info["cells"] == ["full@1", "h2o@0.5", "mine@0.5", "mine_late@0.5"]
    assert (info["model"], info["benchmark"]) == ("mymodel", "sums")
    prints = info["fingerprint"]
    assert prints["cells"]["mine_late@0.5"] == {"_target_": "own_methods.Shortest", "recent": 16}
    assert set(prints["methods"]["mine@0.5"]) == {"own_methods", "own_helper"}
    assert "own_tasks" in prints["code"]
    assert {cell for _, cell, _, _ in read_lines(out)} == set(info["cells"])

    again = command("-cd=mine", "experiment=mine", f"output_dir={out}", "dry_run=true")
    assert "nothing left to run" in again.out

    for name in (*MODULES, "mine"):
        path = parts / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with importable():
        before = (out / "summary.csv").read_bytes()
        (out / "summary.csv").unlink()
        assert report([str(out)]) == 0
        assert (out / "summary.csv").read_bytes() == before


def test_a_folder_is_looked_into_for_the_one_command(command: Command, parts: Path) -> None:
    assert command("-cd", "mine", *SUMS, "method=mine").status == 0
    assert list(Path("results/runs/cells-num_shards=2/sums/tiny-random").iterdir())
    gone = command(*SUMS, "method=mine")
    assert gone.status == 2
    assert "unknown" in gone.err


def test_help_and_mistakes_name_the_users_choices_too(command: Command, parts: Path) -> None:
    shown = command("--config-dir=mine", "--help")
    assert shown.status == 0
    for name in ("mine_late", "mymodel", "sums"):
        assert name in shown.out
    near = command("--config-dir=mine", "method=mine_lat")
    assert near.status == 2
    assert "Did you mean 'mine_late'?" in near.err
    cells = command("--config-dir=mine", "cells=[full@1,mine_lat@0.5]")
    assert "Did you mean 'mine_late'?" in cells.err


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--config-dir"], "--config-dir names no folder"),
        (["-cd="], "-cd names no folder"),
        (["--config-dir", "nowhere"], "nowhere, given by --config-dir or"),
        (["--config-dir=mine", "--config-dir=twin"], "method/mine.yaml is in two places: "),
        (["method._target_=Shortest"], "must name a class with its module, e.g. my_package.MyClass"),
        (["method._target_="], "must name a class with its module"),
        (
            ["method=h2o", "method._target_=own_methods.Shortest"],
            "method=h2o and method._target_=own_methods.Shortest both say which method",
        ),
        (["method._target_=own_methods.Nothing"], "own_methods.Nothing cannot be loaded: "),
        (["method._target_=own_tasks.Sums"], "own_tasks.Sums is no method"),
        (["method._target_=own_methods.Demanding"], "method.recent cannot be used"),
        (["method._target_=own_methods.Shortest", "method.recnt=3"], "Did you mean 'recent'?"),
        (["method._target_=own_methods.Shortest", "method.recent=x"], "must be a whole number"),
        (["model._target_=own_tasks.Sums"], "own_tasks.Sums is not a kvmerge.models.ModelSpec"),
        (
            ["benchmark._target_=own_methods.Shortest"],
            "own_methods.Shortest is not a benchmark: it lacks name, tasks, samples, encode, score",
        ),
        (["model.random._target_=own_tasks.Sums"], "is not a setting"),
        (
            ["cells=[full@1,own_methods.Shortest@0.5]", "method._target_=own_methods.Shortest"],
            "as well",
        ),
        (
            ["--config-dir=mine", "experiment=unpacked"],
            "its file must begin with `# @package _global_`",
        ),
        (["--config-dir=mine", "experiment=unread"], "unread.yaml"),
    ],
)
def test_what_cannot_be_meant_is_told_in_a_sentence(
    command: Command, parts: Path, arguments: list[str], why: str
) -> None:
    write(parts / "twin", {"method/mine.yaml": CONFIGS["method/mine.yaml"]})
    bad = {
        "experiment/unpacked.yaml": "# No header.\ncells: [full@1]\n",
        "experiment/unread.yaml": "a: [\n",
    }
    write(parts / "mine", bad)
    output = command(*arguments)
    assert output.status == 2, output.out
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    assert why in output.err


def test_a_class_named_on_the_command_line_has_its_own_settings_and_name(
    command: Command, parts: Path
) -> None:
    named = ["benchmark._target_=own_tasks.Sums", "benchmark.count=2", "model=tiny-random", *SHARD]
    for how in ("method._target_=", "method="):
        output = command(*named, f"{how}own_methods.Shortest", "method.recent=2", "budget=0.35")
        assert output.status == 0, output.err
    folder = Path("results/runs/cells-num_shards=2/sums-count=2/tiny-random/shards/0-of-2")
    cells = [cell for _, cell, *_ in read_lines(folder)]
    assert sorted(cells) == ["full@1", "own_methods.Shortest-recent=2@0.35"], (
        "the second command found its line there"
    )
    info = run_json(folder)
    assert info["config"]["benchmark"] == {"_target_": "own_tasks.Sums", "count": 2, "terms": [1, 2]}
    given = command(*named, "method._target_=own_methods.Demanding", "method.recent=2")
    assert given.status == 0, given.err


def test_a_sweep_sees_the_same_folders_and_classes(
    command: Command, parts: Path, tmp_path: Path
) -> None:
    out = f"output_dir={tmp_path}/${{hydra:runtime.choices.method}}"
    alone = ("baseline=none", out)
    methods = "method._target_=own_methods.Shortest,own_methods.Demanding"
    output = command("-m", "-cd", "mine", *SUMS, methods, "method.recent=2", *alone)
    assert output.status == 0, output.err
    for name in ("own_methods.Shortest", "own_methods.Demanding"):
        assert len(read_lines(tmp_path / name / "shards" / "0-of-2")) == 1
    assert command("-m", "-cd", "mine", *SUMS, "method=mine,own_methods.Shortest", *alone).status == 0
    assert len(read_lines(tmp_path / "mine" / "shards" / "0-of-2")) == 1


def test_entry_points_are_choices_and_broken_ones_are_in_nobodys_way(
    command: Command, parts: Path
) -> None:
    install(
        parts,
        "pack",
        {
            "kvmerge.methods": {"announced": "own_methods:Shortest", "broken": "own_missing:Method"},
            "kvmerge.benchmarks": {"adding": "own_tasks:Sums"},
        },
    )
    assert "announced" in command("--help").out
    run = ("model=tiny-random", "benchmark=adding", *SHARD)
    output = command(*run, "cells=[full@1,announced@0.5]", "output_dir=out")
    assert output.status == 0, output.err
    assert run_json(Path("out/shards/0-of-2"))["config"]["benchmark"]["_target_"] == "own_tasks.Sums"
    used = command(*run, "method=broken")
    assert used.status == 2
    assert used.err.startswith("error: method 'broken': own_missing.Method cannot be loaded: ")


def test_a_benchmark_that_hydra_finds_in_two_places_is_refused(
    parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(parts, "pack", {"kvmerge.benchmarks": {"sums": "own_tasks:Sums"}})
    monkeypatch.setenv(FOLDERS, str(parts / "mine"))
    with pytest.raises(UserError, match=r"benchmark sums is in two places: .*sums.yaml and own_tasks"):
        compose(["experiment=mine"])


def test_a_change_of_a_methods_helper_is_seen_and_locks_no_other_cell(
    command: Command, parts: Path
) -> None:
    run = ("-cd", "mine", *SUMS, "output_dir=out")
    assert command(*run, "cells=[full@1,mine@0.5]").status == 0
    (parts / "own_helper.py").write_text(MODULES["own_helper.py"] + "\n# changed\n")
    forget()
    assert command(*run, "cells=[full@1]").status == 0
    assert command(*run, "cells=[full@1,h2o@0.5]").status == 0
    changed = command(*run, "cells=[full@1,mine@0.5]")
    assert changed.status == 2
    assert "own_helper" in changed.err
    rerun = command(*run, "cells=[full@1,mine@0.5]", "stale=rerun")
    assert rerun.status == 0, rerun.err


def test_a_metric_of_ones_own_scores_a_custom_benchmark_and_is_part_of_its_fingerprint(
    command: Command, parts: Path
) -> None:
    write(
        parts,
        {
            "rows.jsonl": '{"q": "What is 1 + 1?", "a": "2"}\n{"q": "What is 2 + 2?", "a": "4"}\n',
            "prompt.txt": "Say it.\n{q}",
        },
    )
    custom = ("benchmark=custom", "benchmark.dataset=rows.jsonl", "benchmark.template=prompt.txt")
    given = (
        *custom,
        "benchmark.answers=a",
        "model=tiny-random",
        "method=h2o",
        *SHARD,
        "output_dir=out",
    )
    output = command(*given, "benchmark.metric=own_metrics.BEGINS")
    assert output.status == 0, output.err
    info = run_json(Path("out/shards/0-of-2"))
    assert info["tasks"]["rows"]["metric"] == "own_metrics.BEGINS"
    assert "own_metrics" in info["fingerprint"]["code"]
    unknown = command(*given, "benchmark.metric=own_metrics.BEGIN")
    assert unknown.status == 2
    assert "own_metrics.BEGIN cannot be loaded" in unknown.err


def test_a_benchmark_whose_metric_no_report_could_find_is_refused(
    command: Command, parts: Path
) -> None:
    text = "import own_metrics\nimport own_tasks\n\n\nclass Begun(own_tasks.Sums):\n"
    write(parts, {"own_begun.py": f"{text}    metric = own_metrics.PLAIN\n"})
    refused = command("benchmark=own_begun.Begun", "model=tiny-random", "method=h2o", *SHARD)
    assert refused.status == 2
    assert "unknown metric 'begins'" in refused.err
    assert "Name a metric of your own as it is found: by its module and object" in refused.err
    write(parts, {"own_named.py": f"{text}    metric = own_metrics.BEGINS\n"})
    assert command("benchmark=own_named.Begun", "model=tiny-random", "method=h2o", *SHARD).status == 0
