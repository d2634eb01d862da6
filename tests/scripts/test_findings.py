"""The planned contrasts of the findings: which cells are compared, by how much, and what is written."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from harness.records import Record
from harness.report.run import Run, load_run
from harness.settings import compose
from kvmerge.errors import UserError
from scripts.findings.__main__ import main
from scripts.findings.effects import (
    ALL,
    INSTEAD,
    INSTEAD_OF_OURS,
    OWN_SETS,
    Effect,
    of_folding,
    of_methods,
    pooled,
)
from scripts.findings.figures import draw
from scripts.findings.page import Findings, filled
from scripts.findings.runs import EXPERIMENTS, SETTINGS
from tests.synthetic_run import record, write_run

ROOT = Path(__file__).resolve().parents[2]
KL = {
    "full@1": 0.0,
    "fold:fold=drop@0.2": 1.0,
    "fold@0.2": 1.1,
    "fold:route=cosine@0.2": 1.2,
    "fold:fold=keys_values,route=cosine@0.2": 1.5,
    "fold:fold=drop,keep=keydiff@0.2": 0.6,
    "fold:keep=keydiff,route=cosine@0.2": 0.9,
    "kvmerger@0.2": 2.0,
    "pivot_only@0.2": 1.75,
    "kvmerger@0.35": 1.0,
}


def lines(kl: float) -> list[Record]:
    """Six samples around a KL."""
    return [
        record(str(number), 0.5, kl_to_full=kl + 0.01 * (number % 3), size_bytes=0)
        for number in range(6)
    ]


def a_run(folder: Path, kl: dict[str, float]) -> Path:
    return write_run(folder, {"t": "qa_f1"}, {cell: {"t": lines(value)} for cell, value in kl.items()})


def loaded(folder: Path, kl: dict[str, float] = KL) -> Run:
    return load_run(a_run(folder, kl))


def by_place(effects: list[Effect]) -> dict[tuple[str, str, str], float]:
    return {
        tuple(effect.place): pytest.approx(effect.scored.value)
        for effect in effects
        if effect.measure == "kl"
    }


def test_every_step_is_taken_from_the_cell_that_lacks_it_alone(tmp_path: Path) -> None:
    assert by_place(of_folding(loaded(tmp_path / "run"), 1.0)) == {
        ("values, by position", "h2o", "0.2"): 0.1,
        ("values, by key", "h2o", "0.2"): 0.2,
        ("values, by key", "keydiff", "0.2"): 0.3,
        ("values, by key", ALL, "0.2"): 0.25,
        ("keys and values", "h2o", "0.2"): 0.5,
        ("keys besides values", "h2o", "0.2"): 0.3,
        ("values, by position", ALL, "0.2"): 0.1,
        ("keys and values", ALL, "0.2"): 0.5,
        ("keys besides values", ALL, "0.2"): 0.3,
        (INSTEAD, "keydiff", "0.2"): -0.4,
        (OWN_SETS, "kvmerger", "0.2"): 0.25,
    }


def test_every_method_is_compared_with_h2o_at_its_own_budget(tmp_path: Path) -> None:
    kl = {
        "full@1": 0.0,
        "h2o@0.5": 1.0,
        "tova@0.5": 0.5,
        "h2o@0.2": 2.0,
        "tova@0.2": 2.5,
        "tova@0.1": 3.0,
    }
    assert by_place(of_methods(loaded(tmp_path / "run", {"full@1": 0.0} | kl), 1.0)) == {
        (INSTEAD, "tova", "0.5"): -0.5,
        (INSTEAD, "tova", "0.2"): 0.5,
    }


def test_every_method_is_compared_with_ours_at_a_budget_that_stores_no_more(tmp_path: Path) -> None:
    kl = {"tova@0.35": 0.5, "tova@0.2": 0.75, "replay@0.341": 0.25, "replay@0.195": 0.5}
    assert by_place(of_methods(loaded(tmp_path / "run", {"full@1": 0.0} | kl), 1.0)) == {
        (INSTEAD_OF_OURS, "tova", "0.35"): 0.25,
        (INSTEAD_OF_OURS, "tova", "0.2"): 0.25,
    }


def test_ours_joins_the_methods_that_were_run_without_it(tmp_path: Path) -> None:
    for experiment, kl in (("field", {"h2o@0.35": 1.0}), ("ours", {"replay@0.341": 0.25})):
        a_run(tmp_path / "runs" / experiment / "needle-after", {"full@1": 0.0} | kl)
    assert main(["report", "--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "out")]) == 0
    effects = pd.read_csv(tmp_path / "out" / "effects.csv").set_index(["step", "measure"])
    assert effects.loc[(INSTEAD_OF_OURS, "kl"), "difference"] == pytest.approx(0.75)


def test_methods_are_shown_on_the_samples_that_all_of_them_answered(tmp_path: Path) -> None:
    """Ours has six samples, the others four, whose mean KL is another."""
    for experiment, cell, kl, upto in (
        ("field", "h2o@0.35", 1.0, 4),
        ("ours", "replay@0.341", 0.25, 6),
    ):
        of_task = {name: {"t": lines(value)[:upto]} for name, value in (("full@1", 0.0), (cell, kl))}
        write_run(tmp_path / "runs" / experiment / "needle-after", {"t": "qa_f1"}, of_task)
    assert main(["report", "--runs", str(tmp_path / "runs"), "--results", str(tmp_path)]) == 0
    cells = pd.read_csv(tmp_path / "cells.csv").set_index("method")
    assert set(cells.n) == {4}
    assert cells.loc["replay", "kl"] == pytest.approx(0.25 + 0.01 * (0 + 1 + 2 + 0) / 4)


def test_a_mean_over_selections_pairs_what_they_share(tmp_path: Path) -> None:
    """Each selection's effect goes up and down with the sample; the mean's does not."""
    up = [record(str(n), 0.5, kl_to_full=1 + 0.1 * n, size_bytes=0) for n in range(6)]
    down = [record(str(n), 0.5, kl_to_full=1 - 0.1 * n, size_bytes=0) for n in range(6)]
    cells = {
        "full@1": lines(0.0),
        "fold:fold=drop@0.2": lines(0.0),
        "fold:route=cosine@0.2": up,
        "fold:fold=drop,keep=keydiff@0.2": lines(0.0),
        "fold:keep=keydiff,route=cosine@0.2": down,
    }
    folder = write_run(tmp_path, {"t": "qa_f1"}, {cell: {"t": found} for cell, found in cells.items()})
    found = {e.place.keep: e for e in of_folding(load_run(folder), 1.0) if e.measure == "kl"}
    assert np.ptp(found["h2o"].scored.interval(95)) > 10 * np.ptp(found[ALL].scored.interval(95))


def test_tasks_of_one_sample_are_pooled(tmp_path: Path) -> None:
    tasks = [f"t{number}" for number in range(6)]
    cells = {
        cell: {
            task: [record("0", 0.5, kl_to_full=kl + 0.01 * place, size_bytes=0)]
            for place, task in enumerate(tasks)
        }
        for cell, kl in KL.items()
    }
    run = load_run(write_run(tmp_path, dict.fromkeys(tasks, "qa_f1"), cells))
    found = of_folding(pooled(run), 1.0)
    assert by_place(found) == by_place(of_folding(loaded(tmp_path / "one"), 1.0))
    assert {(effect.n, effect.contexts) for effect in found} == {(6, 6)}
    assert not np.isnan(found[0].scored.interval(95)).any()


def test_a_report_writes_its_tables_and_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a_run(tmp_path / "runs" / "merging" / "mini-after", KL)
    a_run(
        tmp_path / "runs" / "field" / "needle-after", {"full@1": 0.0, "h2o@0.2": 1.0, "tova@0.2": 0.5}
    )
    out = tmp_path / "out"
    assert main(["report", "--runs", str(tmp_path / "runs"), "--results", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {
        "cells.csv",
        "effects.csv",
        "effects.md",
        "folding.png",
    }
    cells = pd.read_csv(out / "cells.csv").set_index(["setting", "method", "budget"])
    assert cells.loc[("needle-after", "tova", 0.2), "kl"] == pytest.approx(0.51)
    effects = pd.read_csv(out / "effects.csv")
    assert len(effects) == 2 * 11 + 2, "KL and score of each"
    assert "| keys besides values | h2o | +0.30 [0.30, 0.30] |" in (out / "effects.md").read_text()
    assert "2 runs" in capsys.readouterr().out


def test_a_report_of_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--runs", str(tmp_path)]) == 2
    assert "holds no run. Make them first" in capsys.readouterr().err


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_planned_run_can_be_composed(experiment: str) -> None:
    for setting in SETTINGS:
        settings = compose(list(setting.words(experiment)))
        budgets = {cell.budget.value for cell in settings.cells}
        assert budgets >= {1.0, 0.35, 0.2}
        assert ({0.5, 0.1, 0.05} <= budgets) is setting.every_budget
        assert not {cell.method_name for cell in settings.cells} & set(setting.too_slow)


def test_a_run_that_fails_ends_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def failing(words: list[str], check: bool) -> subprocess.CompletedProcess[str]:
        seen.append(words[2:])
        return subprocess.CompletedProcess(words, 0 if len(seen) < 2 else 3)

    monkeypatch.setattr(subprocess, "run", failing)
    assert main(["run", "--runs", str(tmp_path), "--limit", "1"]) == 3
    assert [words[0] for words in seen] == ["experiment=merging", "experiment=field"]
    assert f"output_dir={tmp_path / 'merging' / 'mini-after'}" in seen[0]
    assert "limit=1" in seen[0]


def test_one_setting_may_be_run_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def done(words: list[str], check: bool) -> subprocess.CompletedProcess[str]:
        seen.append(words)
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(subprocess, "run", done)
    assert main(["run", "--runs", str(tmp_path), "--setting", "needle-inside"]) == 0
    assert len(seen) == len(EXPERIMENTS)
    assert all({"benchmark=needle", "question=inside", "limit=20"} <= set(words) for words in seen)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Tables of two methods beside ours, on needles."""
    kl = {"h2o@0.35": 1.0, "tova@0.35": 0.75, "replay@0.341": 0.25}
    a_run(tmp_path / "runs" / "field" / "needle-after", {"full@1": 0.0} | kl)
    a_run(tmp_path / "runs" / "merging" / "needle-after", KL)
    assert main(["report", "--runs", str(tmp_path / "runs"), "--results", str(tmp_path)]) == 0
    return tmp_path


def test_the_tables_of_a_page_are_made_anew_and_its_text_is_left(results: Path) -> None:
    page = results / "page.md"
    page.write_text(
        "# Before\n<!-- table steps 0.2 after -->\nold\n<!-- end -->\nbetween\n"
        "<!-- table ours after -->\n<!-- end -->\n"
    )
    for _ in range(2):
        assert main(["page", str(page), "--results", str(results)]) == 0
    text = page.read_text()
    assert text.startswith("# Before\n<!-- table steps 0.2 after -->\n\n| step | needle |")
    assert "| values, by key | +0.25 [0.25, 0.25] |" in text
    assert "old" not in text
    assert "<!-- end -->\nbetween\n" in text
    assert "| 0.35 | needle | 2 | 2 | 0 | `tova` | +0.500 [0.500, 0.500] |" in text


def test_methods_stand_by_their_rank_and_settings_without_any_are_left_out(results: Path) -> None:
    rows = Findings(results).table("field 0.35 after").splitlines()
    assert rows[0] == "| method | needle |"
    assert [row.split("`")[1] for row in rows[2:]] == ["tova", "h2o"]


def test_changes_are_counted_by_the_side_of_zero_that_their_intervals_lie_on(results: Path) -> None:
    table = Findings(results).table("signs")
    assert "| values, by key | 2 | 0 | 2 |" in table, "the mean over the selections is none of them"
    assert "| merged, of its own sets | 1 | 0 | 1 |" in table


@pytest.mark.parametrize("name", ["stairs", "steps", "steps 0.2 after much"])
def test_a_table_that_does_not_exist_is_refused(name: str, results: Path) -> None:
    with pytest.raises(UserError, match=f"no table '{name}'; there are: samples, steps,"):
        Findings(results).table(name)


def test_a_page_without_results_says_how_they_are_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["page", "--results", str(tmp_path)]) == 2
    assert "Write it first: python -m scripts.findings report" in capsys.readouterr().err


def test_the_page_on_findings_has_the_tables_of_the_committed_results() -> None:
    text = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
    assert text.count("<!-- table ") > 5
    assert filled(text, Findings(ROOT / "results" / "findings")) == text


def test_a_selection_has_the_same_mark_in_every_panel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    every = {name.replace("@0.2", "@0.35"): kl for name, kl in KL.items() if "@0.35" not in name}
    keydiff = {name: kl for name, kl in every.items() if "keydiff" in name or name == "full@1"}
    effects = {
        ("merging", name): of_folding(loaded(tmp_path / name, kl), 1.0)
        for name, kl in (("mini-after", every), ("needle-after", keydiff))
    }
    draw(effects, tmp_path)
    (figure,) = drawn
    first, second = (axes.get_legend_handles_labels() for axes in figure.axes[:2])
    assert first[1] == ["h2o", "keydiff"]
    assert second[1] == ["keydiff"]
    assert second[0][0].lines[0].get_color() == first[0][1].lines[0].get_color()
