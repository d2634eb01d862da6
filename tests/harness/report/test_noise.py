"""The noise floor against differences worked out by hand, and where it stands in a report."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from harness.judgement import Judgement
from harness.records import Record
from harness.report.answers import answers
from harness.report.contrasts import AVERAGE, contrasts, contrasts_by_task
from harness.report.divergence import KL
from harness.report.noise import Floor, find_floor, load_floor
from harness.report.page import main, write_report
from harness.report.run import Run, load_run
from harness.report.tables.contrasts import WITHIN_NOISE, contrast_by_task_table, contrast_table
from harness.report.tables.noise import noise_tables
from harness.report.terminal import print_comparison, print_floor
from harness.variants import FILE
from kvmerge.errors import UserError
from tests.synthetic_run import SETTINGS, record, write_run

FULL, A, B = "full@1", "kvmerger@0.5", "h2o@0.5"
TASKS = {"t": "qa_f1", "u": "qa_f1"}
HOW = {"batch_samples": 4, "threads": 2, "kernel": "tiled-torch/float32"}
Scores = Mapping[str, Mapping[str, Sequence[float]]]
BASE: Scores = {FULL: {"t": [1, 1, 1, 1], "u": [1, 1]}, A: {"t": [1, 0, 1, 0], "u": [0.5, 0]}}


def lines(scores: Sequence[float], **fields: Any) -> list[Record]:
    return [record(f"{i}", score, **fields) for i, score in enumerate(scores)]


def write_variant(
    folder: Path, scores: Scores, kl: float = 0.2, info: Mapping[str, Any] = {}, **how: Any
) -> None:
    cells = {
        cell: {
            task: lines(of_task, kl_to_full=0 if cell == FULL else kl, **HOW | how)
            for task, of_task in by_task.items()
        }
        for cell, by_task in scores.items()
    }
    write_run(folder, TASKS, cells, **info)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A noise run: one sample of A lost in batches of one, two gained in bfloat16 at another KL."""
    out = tmp_path / "runs" / "noise" / "toy" / "toy-1m"
    variants = out / "variants"
    write_variant(variants / "base", BASE)
    lost = {**BASE, A: {"t": [1, 0, 0, 0], "u": [0.5, 0]}}
    write_variant(variants / "batch-1", lost, batch_samples=1)
    gained = {**BASE, A: {"t": [1, 0, 1, 0], "u": [1, 1]}}
    write_variant(variants / "bfloat16", gained, kl=0.5, kernel="flash-cpu/bfloat16")
    write_variant(variants / "batch-4", BASE)  # as the base did
    listed = [
        ("base", "", ""),
        ("batch-1", "batch_size", ""),
        ("bfloat16", "dtype", ""),
        ("batch-4", "batch_size", ""),
        ("float16", "dtype", "numbers overflow"),
    ]
    list_variants(out, listed)
    return out


def list_variants(folder: Path, listed: Sequence[tuple[str, str, str]], **names: str) -> None:
    variants = [dict(zip(("name", "setting", "obstacle"), each, strict=True)) for each in listed]
    content = {"model": "toy-1m", "benchmark": "toy", "variants": variants} | names
    (folder / FILE).write_text(json.dumps(content))


def compared(folder: Path, **info: Any) -> Run:
    """A run whose contrast of A and B is 12.5 points on t, 25 on u and 18.75 on the average."""
    cells = {
        A: {"t": lines([1, 1, 1, 1, 1, 0.5, 0.5, 0.5]), "u": lines([1] * 8)},
        B: {"t": lines([1, 1, 1, 1, 0.5, 0.5, 0.5, 0]), "u": lines([0.75] * 8)},
    }
    return load_run(write_run(folder, TASKS, cells, **info))


def test_the_noise_of_a_task_is_the_largest_difference_of_any_variant_and_cell(folder: Path) -> None:
    floor = load_floor(folder)
    found = {
        task: (each.variant, each.cell, each.n, each.difference) for task, each in floor.largest.items()
    }
    assert found == {
        "t": ("batch-1", A, 4, -25),
        "u": ("bfloat16", A, 2, 75),
        AVERAGE: ("bfloat16", A, 6, 37.5),
        KL: ("bfloat16", A, 6, pytest.approx(0.3)),
    }
    assert [floor.noise(task) for task in ("t", "u", AVERAGE)] == [25, 75, 37.5]
    assert math.isnan(floor.noise("another"))


def test_only_samples_of_both_count_and_a_task_that_is_not_there_has_no_noise(folder: Path) -> None:
    some = {FULL: {"t": [1, 1]}, A: {"t": [0, 0]}}  # of four samples, and of two tasks
    write_variant(folder / "variants" / "threads-1", some, threads=1)
    list_variants(folder, [("base", "", ""), ("threads-1", "threads", "")])
    floor = load_floor(folder)
    assert [(c.cell, c.task, c.n, c.difference) for c in floor.changes] == [
        (FULL, "t", 2, 0),
        (A, "t", 2, -50),
    ]
    assert math.isnan(floor.noise("u"))
    assert math.isnan(floor.noise(AVERAGE))


def test_a_variant_that_ran_as_the_base_or_not_at_all_is_passed_over_with_the_reason(
    folder: Path,
) -> None:
    floor = load_floor(folder)
    assert list(floor.variants) == ["batch-1", "bfloat16"]
    assert floor.passed_over == {
        "batch-4": "it ran as the base did, in the same batches, threads and kernels",
        "float16": "numbers overflow",
    }


def test_changed_answers_are_counted_where_scores_do_not_move(folder: Path) -> None:
    path = folder / "variants" / "batch-1" / "predictions" / "u" / f"{A}.jsonl"
    first, *rest = path.read_text().splitlines(keepends=True)
    path.write_text("".join([first.replace("Grüße", "Grüsse"), *rest]))
    _, by_variant = noise_tables(load_floor(folder))
    shares = dict(zip(by_variant.data["variant"], by_variant.data["answers_changed"], strict=True))
    assert shares == {"batch-1": pytest.approx(1 / 12), "bfloat16": 0}  # two cells of six samples


def test_the_tables_hold_every_difference_and_name_what_made_the_largest(folder: Path) -> None:
    by_task, by_variant = noise_tables(load_floor(folder))
    assert by_task.rows == (
        ("t", "4", "25.00", "batch-1", A, "50.00", "25.00"),
        ("u", "2", "75.00", "bfloat16", A, "25.00", "100.00"),
        ("average", "6", "37.50", "bfloat16", A, "37.50", "75.00"),
        ("KL to full", "6", "0.3000", "bfloat16", A, "0.2000", "0.5000"),
    )
    # two variants, two cells on two tasks and the average, and one on KL
    assert len(by_task.data) == 2 * (2 * 3 + 1)
    assert [row[:2] + row[3:] for row in by_variant.rows] == [
        ("batch-1", "batch_size", "0.0%", "25.00", "+0.00", "-12.50"),
        ("bfloat16", "dtype", "0.0%", "75.00", "+0.00", "+37.50"),
    ]
    assert [row[2] for row in by_variant.rows] == ["batch of 1", "kernel flash-cpu/bfloat16"]


def set_prints(folder: Path, variant: str, **prints: Any) -> None:
    path = folder / "variants" / variant / "run.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps(info | {"fingerprint": SETTINGS["fingerprint"] | prints}))


@pytest.mark.parametrize(
    ("prints", "setting"),
    [
        ({"seed": 7}, r"seed \(7 against None\)"),
        ({"data": {"t": "x"}}, r"data\.t \('x' against 'abc'\)"),
        ({"model": {"chat": "none", "dtype": "bfloat16"}}, r"model\.chat \('none' against 'chat'\)"),
    ],
)
def test_a_variant_that_differs_in_more_than_it_was_to_change_is_refused_naming_the_setting(
    folder: Path, prints: dict[str, Any], setting: str
) -> None:
    model = {"chat": "chat", "dtype": "float32"}
    for name in ("base", "batch-1"):
        set_prints(folder, name, model=model)
    set_prints(folder, "bfloat16", **{"model": model} | prints)
    with pytest.raises(UserError, match=f"differ in {setting}, so .* bfloat16 alone changes"):
        load_floor(folder)


def test_a_variant_of_mixed_threads_is_refused(folder: Path) -> None:
    path = folder / "variants" / "base" / "predictions" / "t" / f"{A}.jsonl"
    path.write_text(path.read_text().replace('"threads": 2', '"threads": 1', 1))
    with pytest.raises(UserError, match=r"base was run with different threads \(1, 2\)"):
        load_floor(folder)


def test_another_dtype_alone_is_what_the_variant_is_for(folder: Path) -> None:
    for name, dtype in (("base", "float32"), ("bfloat16", "bfloat16")):
        set_prints(folder, name, model={"dtype": dtype})
    list_variants(folder, [("base", "", ""), ("bfloat16", "dtype", "")])
    assert list(load_floor(folder).variants) == ["bfloat16"]


def of_default_place(folder: Path) -> Path:
    return folder.parents[2] / "mini" / "toy" / "toy-1m"


def test_a_contrast_no_larger_than_noise_is_marked(folder: Path) -> None:
    run = compared(of_default_place(folder))
    found = find_floor(run, run.judgement)
    assert found.floor is not None
    by_task = {one.task: one for one in contrasts_by_task(run)}
    (average,) = contrasts(run)
    sizes = [by_task["t"].scored.value, by_task["u"].scored.value, average.scored.value]
    assert sizes == [12.5, 25, 18.75]
    assert [found.floor.covers(one) for one in (*by_task.values(), average)] == [True, True, True]
    table = contrast_by_task_table(run, 1, found)
    assert table is not None
    assert table.header[-2:] == ("noise", "verdict")
    assert [row[-2] for row in table.rows] == ["25.00", "75.00"]
    assert all(row[-1].split("\n")[0].endswith(WITHIN_NOISE) for row in table.rows)
    assert WITHIN_NOISE in table.caption
    assert list(table.data["noise"]) == [25, 75]
    assert list(table.data["below_noise"]) == [True, True]


def test_a_contrast_above_noise_and_one_without_noise_are_not_marked(folder: Path) -> None:
    some = {cell: {"t": BASE[cell]["t"]} for cell in BASE}
    some[A] = {"t": [0.9, 0, 1, 0]}  # 2.5 points, on one of two tasks
    write_variant(folder / "variants" / "threads-1", some, threads=1)
    list_variants(folder, [("base", "", ""), ("threads-1", "threads", "")])
    run = compared(of_default_place(folder))
    table = contrast_by_task_table(run, 1, find_floor(run, run.judgement))
    assert table is not None
    assert [row[-2] for row in table.rows] == ["2.50", ""]
    assert not any(WITHIN_NOISE in row[-1] for row in table.rows)
    assert [*table.data["below_noise"]] == [False, None]


def test_an_average_over_other_tasks_is_no_noise_of_this_one(folder: Path) -> None:
    cells = {cell: {"t": lines([1, score, 1, 0])} for cell, score in ((A, 1), (B, 0))}
    run = load_run(write_run(of_default_place(folder), {"t": "qa_f1"}, cells))
    found = find_floor(run, run.judgement)
    assert found.floor is not None
    assert found.floor.noise("t") == 25
    assert math.isnan(found.floor.noise(AVERAGE))
    assert "averages are over other tasks" in found.note
    same = find_floor(compared(folder.parent / "same" / "x" / "y"), Judgement(noise=str(folder)))
    assert "other tasks" not in same.note


def test_noise_of_0_marks_nothing(folder: Path) -> None:
    write_variant(folder / "variants" / "threads-1", BASE, threads=1)
    list_variants(folder, [("base", "", ""), ("threads-1", "threads", "")])
    alike = {cell: {"t": lines([1, 0, 1, 0])} for cell in (A, B)}
    run = load_run(write_run(of_default_place(folder), {"t": "qa_f1"}, alike))
    found = find_floor(run, run.judgement)
    assert found.floor is not None
    assert found.floor.noise("t") == 0
    assert not found.floor.covers(contrasts_by_task(run)[0])


@pytest.mark.usefixtures("undrawn")
def test_a_report_finds_the_floor_of_its_model_and_benchmark_and_says_which(folder: Path) -> None:
    run = compared(of_default_place(folder))
    write_report([run])
    tables = run.output_dir / "tables"
    assert pd.read_csv(tables / "contrasts.csv")["noise"].tolist() == [37.5]
    assert str(folder) in (tables / "contrasts.md").read_text()
    assert "n = 2 to 4 samples a task" in (tables / "contrasts.md").read_text()
    assert (tables / "noise.md").exists()
    assert (tables / "noise_by_variant.csv").exists()
    *_, (_, left_open) = ((one.question, one.lines) for one in answers(run, run.judgement))
    texts = [line.text for line in left_open]
    assert any("Within noise are 1 of 1 contrasts: KVMerger at 50% against H2O." in t for t in texts)
    console = Console(file=io.StringIO(), width=200)
    print_comparison(run, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"{WITHIN_NOISE}: within noise, 37.50 on the average" in shown


@pytest.mark.usefixtures("undrawn")
def test_without_a_floor_the_table_says_that_noise_is_not_measured(tmp_path: Path) -> None:
    run = compared(tmp_path / "elsewhere" / "toy" / "toy-1m")
    table = contrast_table(run, 1, find_floor(run, run.judgement))
    assert table is not None
    assert "noise" not in table.header
    assert table.data["noise"].isna().all()
    assert any("not measured" in note and "experiment=noise" in note for note in table.notes)


@pytest.mark.usefixtures("undrawn")
def test_a_folder_that_is_named_is_used_and_of_another_model_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    away = compared(tmp_path / "away" / "x" / "y")
    assert main([str(away.output_dir), "--noise", str(folder)]) == 0
    assert pd.read_csv(away.output_dir / "tables" / "contrasts.csv")["noise"].tolist() == [37.5]
    other = compared(tmp_path / "other" / "x" / "y", model="toy-2m")
    assert main([str(other.output_dir), "--noise", str(folder)]) == 2
    assert "measured with model toy-1m, and this run has toy-2m" in capsys.readouterr().err
    assert main([str(away.output_dir), "--noise", str(tmp_path)]) == 2
    assert f"holds no {FILE}" in capsys.readouterr().err


def test_a_floor_of_another_model_at_the_usual_place_is_left_out(folder: Path) -> None:
    list_variants(folder, [("base", "", "")], benchmark="another")
    found = find_floor(compared(of_default_place(folder)), Judgement())
    assert found.floor is None
    assert "measured with benchmark another" in found.note


def test_a_damaged_floor_at_the_usual_place_does_not_stand_in_the_way(folder: Path) -> None:
    (folder / "variants" / "bfloat16" / "run.json").unlink()
    found = find_floor(compared(of_default_place(folder)), Judgement())
    assert found.floor is None
    assert "bfloat16 has no run.json" in found.note


def test_a_folder_that_a_run_was_given_and_is_gone_is_told(folder: Path, tmp_path: Path) -> None:
    run = compared(tmp_path / "a" / "b" / "c", config={"noise": str(tmp_path / "gone")})
    found = find_floor(run, run.judgement)
    assert found.floor is None
    assert "is gone; --noise names another" in found.note
    again = run.judgement.but(noise=str(folder))
    assert find_floor(run, again).floor is not None


def test_a_noise_run_reports_itself(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder)]) == 0
    assert (folder / "tables" / "noise.csv").exists()
    out = capsys.readouterr().out
    assert "Noise floor" in out
    assert "float16 says nothing: numbers overflow." in out


def test_an_unfinished_noise_run_is_told_and_left_out_of_reports(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / FILE).unlink()
    assert main([str(folder)]) == 2
    assert "not a finished run of experiment=noise" in capsys.readouterr().err
    found = find_floor(compared(of_default_place(folder)), Judgement())
    assert found.floor is None
    assert "not a finished run" in found.note


def test_a_floor_goes_to_the_folder_that_was_asked_for(folder: Path, tmp_path: Path) -> None:
    assert main([str(folder), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "tables" / "noise.tex").exists()
    assert not (folder / "tables").exists()
    assert main([str(folder), str(folder), "--out", str(tmp_path / "out")]) == 2


def test_a_floor_without_any_variant_says_so(folder: Path) -> None:
    list_variants(folder, [("base", "", ""), ("batch-4", "batch_size", "")])
    floor: Floor = load_floor(folder)
    assert noise_tables(floor) == []
    console = Console(file=io.StringIO(), width=120)
    print_floor(floor, console)
    assert "no noise floor" in console.file.getvalue()  # type: ignore[attr-defined]
