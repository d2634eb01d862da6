"""Cells that were run apart: which of them share a table, and what is said of the others."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from harness.records import Record
from harness.report.joined import join, join_all, on_common_samples
from harness.report.page import main, write_report
from harness.report.run import Run, averages, differences, load_run
from harness.report.words import gaps
from kvmerge.errors import UserError
from tests.synthetic_run import record, write_run

TASKS = {"a": "qa_f1", "b": "qa_f1"}
PRINTS: dict[str, Any] = {
    "model": {"dtype": "float32", "device": "auto"},
    "device": "cpu",
    "seed": 0,
    "policy": {"pos": "absolute"},
    "code": {"kvmerge.engine": "e1"},
    "data": {"a": "da", "b": "db"},
}


def lines(ids: Iterable[str], score: float = 0.5, **fields: Any) -> list[Record]:
    return [record(name, score, **fields) for name in ids]


def a_run(folder: Path, held: dict[str, dict[str, str | list[Record]]], **info: Any) -> Run:
    """A run whose cells hold samples of one letter each, `{cell: {task: "xyz"}}`."""
    cells = {
        cell: {task: lines(of) if isinstance(of, str) else of for task, of in by_task.items()}
        for cell, by_task in held.items()
    }
    made = {cell: {"baselines": "m1"} for cell in held}
    prints = PRINTS | {"cells": {cell: {"recent": 1} for cell in held}, "methods": made}
    return load_run(write_run(folder, TASKS, cells, **({"fingerprint": prints} | info)))


def other_prints(run: Run, **changed: Any) -> Run:
    """The same folder as it would be had a setting been another."""
    path = run.output_dir / "run.json"
    content = json.loads(path.read_text())
    content["fingerprint"] |= changed
    path.write_text(json.dumps(content))
    return load_run(run.output_dir)


def held(run: Run) -> dict[tuple[str, str], str]:
    return {key: "".join(each.id for each in found) for key, found in run.records.items()}


# cells of one folder


def test_cells_that_hold_the_same_samples_are_left_as_they_are(tmp_path: Path) -> None:
    run = a_run(tmp_path, {"full@1": {"a": "xyz"}, "h2o@0.5": {"a": "xyz"}})
    assert on_common_samples(run, ["full@1", "h2o@0.5"]) is run


def test_a_cell_with_fewer_samples_than_the_run_is_left_out_and_named(tmp_path: Path) -> None:
    cells = {
        "full@1": {"a": "xyz", "b": "xyz"},
        "kvmerger@0.5": {"a": "xy", "b": "x"},
        "cam@0.5": {"a": "xy", "b": "x"},
        "h2o@0.5": {"a": "xyz", "b": "xyz"},
    }
    run = on_common_samples(a_run(tmp_path, cells), ["full@1", "h2o@0.5"])
    assert run.cells == ("full@1", "h2o@0.5")
    (note,) = run.remarks
    assert note in gaps(run)
    assert "kvmerger@0.5, cam@0.5 on a (2 of 3), b (1 of 3)" in note
    assert set(averages(run)) == {"full@1", "h2o@0.5"}


def test_a_run_of_fewer_samples_shows_those_of_every_cell(tmp_path: Path) -> None:
    cells = {
        "full@1": {"a": "xyz"},
        "kvmerger@0.5": {"a": [*lines("xz", 1.0), *lines("y", 0.0)]},
        "h2o@0.5": {"a": "zx"},
    }
    run = on_common_samples(a_run(tmp_path, cells), ["full@1", "h2o@0.5"])
    assert held(run) == {("a", "full@1"): "xz", ("a", "kvmerger@0.5"): "xz", ("a", "h2o@0.5"): "zx"}
    assert run.scores["a", "kvmerger@0.5"].value == 100
    (note,) = run.remarks
    assert note.endswith(f"make report DIRS={tmp_path}")


def test_tasks_that_a_run_has_nothing_of_are_not_shown(tmp_path: Path) -> None:
    cells = {"full@1": {"a": "xy", "b": "xy"}, "kvmerger@0.5": {"a": "xy"}, "h2o@0.5": {"b": "xy"}}
    run = on_common_samples(a_run(tmp_path, cells), ["full@1", "h2o@0.5"])
    assert list(run.tasks) == ["b"]
    assert run.cells == ("full@1", "h2o@0.5")
    assert "kvmerger@0.5 on b (0 of 2)" in " ".join(gaps(run))


# cells of several folders


def test_cells_of_several_folders_come_into_one_run(tmp_path: Path) -> None:
    one = a_run(tmp_path / "1", {"full@1": {"a": "xy"}, "h2o@0.5": {"a": lines("xy", 0.25)}})
    two = a_run(tmp_path / "2", {"full@1": {"a": "xy", "b": "x"}, "cam@0.5": {"a": lines("xy", 0.75)}})
    run = join([one, two])
    assert run.cells == ("full@1", "h2o@0.5", "cam@0.5")
    assert held(run) == {
        ("a", "full@1"): "xy",
        ("a", "h2o@0.5"): "xy",
        ("a", "cam@0.5"): "xy",
        ("b", "full@1"): "x",
    }
    assert run.remarks == ()
    found = {each.cell: each.scored.value for each in differences(run, "full@1") if each.task == "a"}
    assert found == {"h2o@0.5": -25, "cam@0.5": 25}
    assert set(run.recorded("fingerprint", "methods")) == set(run.cells) == set(run.info["cells"])
    assert run.place == f"{tmp_path / '1'}, {tmp_path / '2'}"


def test_folders_of_other_models_and_benchmarks_stay_apart(tmp_path: Path) -> None:
    cells = {"full@1": {"a": "x"}}
    names: tuple[dict[str, str], ...] = ({}, {"model": "other"}, {}, {"benchmark": "other"})
    runs = [a_run(tmp_path / str(i), cells, **named) for i, named in enumerate(names)]
    joined = join_all(runs)
    assert [(run.model, run.benchmark, len(run.joined)) for run in joined] == [
        ("toy-1m", "toy", 2),
        ("other", "toy", 0),
        ("toy-1m", "other", 0),
    ]


def test_samples_that_only_a_later_folder_holds_are_added_to_a_cell(tmp_path: Path) -> None:
    one = a_run(tmp_path / "1", {"full@1": {"a": "xy"}, "h2o@0.5": {"a": "xy"}})
    two = a_run(tmp_path / "2", {"full@1": {"a": "yz"}, "cam@0.5": {"a": "yz"}})
    run = join([one, two])
    assert held(run)["a", "full@1"] == "xyz"
    assert "The cells of a hold different samples (n = 2 to 3)" in " ".join(gaps(run))
    pairs = {each.cell: each.n for each in differences(run, "full@1") if each.task == "a"}
    assert pairs == {"h2o@0.5": 2, "cam@0.5": 2}


def test_answers_that_differ_between_folders_are_counted_and_the_first_are_shown(
    tmp_path: Path,
) -> None:
    one = a_run(tmp_path / "1", {"full@1": {"a": "xyz"}}, device="cpu")
    others = [*lines("x"), *lines("y", prediction="another"), *lines("z", 1.0)]
    two = a_run(tmp_path / "2", {"full@1": {"a": others}}, device="cuda:0")
    two = other_prints(two, device="cuda", model={"dtype": "float32", "device": "cuda"})
    run = join([one, two])
    assert run.records["a", "full@1"] == one.records["a", "full@1"]
    (note,) = run.remarks
    assert note == (
        f"full@1: 2 of the 3 answers that {tmp_path / '1'} and {tmp_path / '2'} both hold differ "
        f"(device cpu and cuda:0); those of {tmp_path / '1'} are shown."
    )
    assert note in gaps(run)


def test_a_perplexity_may_differ_in_its_last_digits(tmp_path: Path) -> None:
    def of(folder: str, score: float) -> Run:
        found = [record("x", score, extra={"nll": 10.0, "tokens": 5})]
        return load_run(write_run(tmp_path / folder, {"t": "perplexity"}, {"full@1": {"t": found}}))

    assert join([of("1", 56.4), of("2", 56.4001)]).remarks == ()
    assert len(join([of("3", 56.4), of("4", 56.5)]).remarks) == 1


@pytest.mark.parametrize(
    ("part", "why"),
    [("cells", "recent is 2 there and 1 here"), ("methods", "baselines is 'm2' there and 'm1' here")],
)
def test_a_cell_of_another_version_of_its_method_is_not_mixed_in(
    tmp_path: Path, part: str, why: str
) -> None:
    one = a_run(tmp_path / "1", {"h2o@0.5": {"a": "xy"}})
    two = a_run(tmp_path / "2", {"h2o@0.5": {"a": "xyz"}, "cam@0.5": {"a": "xy"}})
    changed = {"cells": {"recent": 2}, "methods": {"baselines": "m2"}}[part]
    two = other_prints(two, **{part: {"h2o@0.5": changed, "cam@0.5": changed}})
    run = join([one, two])
    assert held(run) == {("a", "h2o@0.5"): "xy", ("a", "cam@0.5"): "xy"}
    (note,) = run.remarks
    assert note.startswith(f"h2o@0.5 of {tmp_path / '2'} is left out")
    assert why in note


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"seed": 1}, r"differ in seed \(0 against 1\)"),
        ({"policy": {"pos": "rolled"}}, r"differ in policy.pos \('absolute' against 'rolled'\)"),
        ({"data": {"a": "other"}}, r"differ in data.a \('da' against 'other'\)"),
        ({"model": {"dtype": "bfloat16"}}, r"differ in model.dtype \('float32' against 'bfloat16'\)"),
        ({"contents": {"config.json": "c"}}, r"differ in contents.config.json \(None against 'c'\)"),
        ({"code": {"kvmerge.engine": "e2"}}, r"differ in code.kvmerge.engine \('e1' against 'e2'\)"),
    ],
)
def test_what_does_not_compare_is_refused_by_folder_setting_and_values(
    tmp_path: Path, changed: dict[str, Any], why: str
) -> None:
    one, two = (a_run(tmp_path / name, {"full@1": {"a": "x"}}) for name in "12")
    with pytest.raises(UserError, match=f"1 and .*2 {why}.*--separate"):
        join([one, other_prints(two, **changed)])


def test_data_that_only_one_folder_has_is_no_difference(tmp_path: Path) -> None:
    one, two = (a_run(tmp_path / name, {"full@1": {"a": "x"}}) for name in "12")
    assert join([one, other_prints(two, data={"a": "da", "c": "dc"})]).remarks == ()


def test_other_prompts_are_refused_by_task_and_sample(tmp_path: Path) -> None:
    one = a_run(tmp_path / "1", {"full@1": {"a": "xy"}})
    two = a_run(tmp_path / "2", {"cam@0.5": {"a": lines("yz", prompt_hash="beef")}})
    with pytest.raises(UserError, match=r"the prompt of a, sample 'y' \('cafe' against 'beef'\)"):
        join([one, two])


def test_other_metrics_are_refused(tmp_path: Path) -> None:
    one = a_run(tmp_path / "1", {"full@1": {"a": "x"}})
    two = load_run(
        write_run(tmp_path / "2", {"a": "rouge_l"}, {"h2o@0.5": {"a": lines("x")}}, fingerprint=PRINTS)
    )
    with pytest.raises(UserError, match=r"metric of a \('qa_f1' against 'rouge_l'\)"):
        join([one, two])


def test_folders_that_were_judged_otherwise_are_named(tmp_path: Path) -> None:
    one, two = (
        a_run(tmp_path / str(margin), {"full@1": {"a": "x"}}, config={"margin": margin})
        for margin in (1, 2)
    )
    run = join([one, two])
    assert run.judgement.margin == 1
    (note,) = run.remarks
    assert f"Judged as {tmp_path / '1'} is; {tmp_path / '2'} was given another margin" in note


# the report of several folders


def two_folders(tmp_path: Path) -> list[str]:
    """Two folders with a full cache and a cell each."""
    for name, cell in (("1", "h2o@0.5"), ("2", "cam@0.5")):
        a_run(tmp_path / name, {each: {"a": "xyzw", "b": "xyzw"} for each in ("full@1", cell)})
    return [str(tmp_path / name) for name in "12"]


@pytest.mark.usefixtures("undrawn")
def test_one_command_makes_one_table_of_two_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main([*two_folders(tmp_path), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out / 'report.html'}\n"
    scores = pd.read_csv(out / "tables" / "scores.csv")
    assert set(scores["method"]) == {"full", "h2o", "cam"}
    contrasts = pd.read_csv(out / "tables" / "contrasts.csv")[["a", "b"]]
    assert ["h2o@0.5", "cam@0.5"] in contrasts.values.tolist()
    assert len(pd.read_csv(out / "tables" / "summary.csv")) == 6
    for name in "12":
        assert len(pd.read_csv(tmp_path / name / "summary.csv")) == 4, "each folder keeps its own"
    page = (out / "report.html").read_text()
    assert str(tmp_path / "1") in page
    assert str(tmp_path / "2") in page
    card = (out / "card.md").read_text()
    assert card.count("## toy-1m on toy in ") == 2
    exported = list((out / "every_eval_ever").rglob("*.json"))
    assert len(exported) >= 3, "every cell, with what made it"


@pytest.mark.usefixtures("undrawn")
def test_folders_that_do_not_compare_get_tables_of_their_own_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = two_folders(tmp_path)
    other_prints(load_run(Path(folders[1])), seed=1)
    out = tmp_path / "out"
    assert main([*folders, "--out", str(out)]) == 2
    assert "differ in seed (0 against 1)" in capsys.readouterr().err
    assert not out.exists()
    assert main([*folders, "--out", str(out), "--separate"]) == 0
    assert len(list(out.glob("tables/*/scores.csv"))) == 2


@pytest.mark.usefixtures("undrawn")
def test_a_joined_report_goes_to_results_report_unless_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = join_all([load_run(Path(folder)) for folder in two_folders(tmp_path)])
    assert write_report(runs) == Path("results/report/report.html")
