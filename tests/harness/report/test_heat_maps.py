from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from harness.records import Record
from harness.report.groups import scores_by
from harness.report.names import cell_label
from harness.report.plots.heat_maps import draw_heat_map, heat_maps
from harness.report.plots.style import STYLE
from harness.report.run import Run, load_run
from kvmerge.names import parse_name
from tests.synthetic_run import record, write_run

GRID = {(512, 0): 1.0, (512, 50): 0.25, (1024, 0): 0.5, (1024, 100): 0.0}


def records(grid: dict[tuple[int, int], float], **extra: float) -> list[Record]:
    return [
        record(
            f"{length}-{depth}",
            score,
            extra={"groups": {"length": length, "depth": depth}} | extra,
        )
        for (length, depth), score in grid.items()
    ]


def run_of(folder: Path, cells: dict[str, dict[str, list[Record]]], **tasks: str) -> Run:
    """A run whose cells kept what their names say, as nothing else is the point here."""
    kept = {
        cell: {
            task: [replace(one, budget_achieved=float(parse_name(cell).budget.value)) for one in lines]
            for task, lines in by_task.items()
        }
        for cell, by_task in cells.items()
    }
    return load_run(write_run(folder, tasks or {"number": "number"}, kept))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    other = {place: 1 - score for place, score in GRID.items()}
    del other[512, 50]
    return run_of(
        tmp_path, {"full@1": {"number": records(GRID)}, "h2o@0.5": {"number": records(other)}}
    )


def drawn(run: Run) -> Figure:
    with mpl.rc_context(STYLE):
        return draw_heat_map(run, scores_by(run, ("depth", "length")))


def panels(run: Run) -> dict[str, np.ndarray]:
    """What each cell's panel shows, NaN where it is blank."""
    figure = drawn(run)
    return {
        axis.get_title(loc="left"): np.ma.filled(axis.images[0].get_array().astype(float), np.nan)
        for axis in figure.axes
        if axis.get_title(loc="left")
    }


def test_depth_goes_down_and_length_across(run: Run) -> None:
    shown = panels(run)
    nan = np.nan
    np.testing.assert_array_equal(shown["Full cache"], [[100, 50], [25, nan], [nan, 0]])
    np.testing.assert_array_equal(shown["H2O 50%"], [[0, 50], [nan, nan], [nan, 100]])


def test_all_panels_share_one_scale_that_reads_without_colour_vision(tmp_path: Path) -> None:
    low = {place: score / 4 for place, score in GRID.items()}
    cells = {"full@1": {"number": records(GRID)}, "h2o@0.5": {"number": records(low)}}
    run = run_of(tmp_path, cells)
    figure = drawn(run)
    images = [axis.images[0] for axis in figure.axes if axis.images]
    assert {image.get_clim() for image in images} == {(0, 100)}
    assert {image.get_cmap().name for image in images} == {"viridis"}
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["0", "50", "100"]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == [
        "100\n(512)",
        "100\n(1024)",
    ]


def test_few_squares_have_their_numbers_in_ink_that_stands_out(run: Run) -> None:
    figure = drawn(run)
    found = {text.get_position(): text for text in figure.axes[0].texts}
    assert {place: text.get_text() for place, text in found.items()} == {
        (0, 0): "100",
        (0, 1): "25",
        (1, 0): "50",
        (1, 2): "0",
    }
    assert to_hex(found[1, 2].get_color()) == "#ffffff"
    assert to_hex(found[0, 0].get_color()) != "#ffffff"


def test_squares_too_narrow_for_a_number_have_none(tmp_path: Path) -> None:
    grid = {(length, depth): 1.0 for length in range(300, 320) for depth in range(0, 101, 10)}
    run = run_of(tmp_path, {"full@1": {"number": records(grid)}})
    figure = drawn(run)
    assert not figure.axes[0].texts


@pytest.mark.parametrize("count", [1, 5])
def test_any_number_of_cells_has_a_panel_each(tmp_path: Path, count: int) -> None:
    cells = ["full@1", *(f"h2o@0.{i}" for i in range(1, count))]
    run = run_of(tmp_path, {cell: {"number": records(GRID)} for cell in cells})
    assert list(panels(run)) == [cell_label(cell) for cell in cells]


def test_each_task_has_a_figure_of_its_own_with_its_setting(tmp_path: Path) -> None:
    by_task = {"number": records(GRID), "recall": records(GRID)}
    run = run_of(tmp_path, {"full@1": by_task}, number="number", recall="recall")
    plots = heat_maps(run)
    assert [plot.name for plot in plots] == ["heat_map_number", "heat_map_recall"]
    for plot in plots:
        assert plot.png.startswith(b"\x89PNG")
        assert plot.pdf.startswith(b"%PDF")
        for part in ("toy-1m on toy", "samples a square: 1,", "seed 42"):
            assert part in plot.caption


def test_what_is_no_score_of_0_to_100_has_no_map(tmp_path: Path) -> None:
    run = run_of(tmp_path, {"full@1": {"t": records(GRID, nll=1.0, tokens=1)}}, t="perplexity")
    assert heat_maps(run) == []


def test_one_group_alone_has_no_map(tmp_path: Path) -> None:
    alone = [record("0", 1.0, extra={"groups": {"length": "0-4k"}})]
    assert heat_maps(run_of(tmp_path, {"full@1": {"number": alone}})) == []
