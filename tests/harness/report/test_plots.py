"""Every figure of made-up runs of many shapes: what a reader can trust in all of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from harness.judgement import Judgement
from harness.records import Record
from harness.report.bootstrap import Estimate
from harness.report.divergence import kl_averages
from harness.report.plots import forest
from harness.report.plots.draw import Drawn, draw_all
from harness.report.plots.style import COLUMN, PAGE, SMALL, columns_of, looks, whiskers, wrap
from harness.report.run import Run, load_run
from tests.synthetic_run import record, write_run

LONG = [f"a_task_with-a_rather_long_name_in_{language}" for language in "abcdefghijklmnopqrstu"]
METHODS = ("kvmerger", "h2o", "cam", "snapkv", "streaming_llm", "d2o")
VARIANT = "kvmerger:sigma=mean_distance,linkage=adjacent"
COMPARISON = ("full@1", *(f"{m}@{b}" for b in ("0.5", "0.35") for m in METHODS[:3]))


def made_up(
    folder: Path,
    cells: Sequence[str] = COMPARISON,
    tasks: Sequence[str] = ("passkey", "key_value", "zero"),
    n: int = 4,
    kl: bool = True,
    **info: Any,
) -> Run:
    """Scores of `n` samples, 0 on the task called zero; KL beside them, but for the full cache."""
    rng = np.random.default_rng(0)

    def records(cell: str, task: str) -> list[Record]:
        budget = float(cell.rpartition("@")[2])
        share = budget if budget <= 1 else budget / 1024
        return [
            record(
                str(i),
                0.0 if task == "zero" else float(rng.random()),
                budget_achieved=share - 0.001,
                kv_bytes=int(2**24 * share),
                kl_to_full=float(rng.random()) if kl and not cell.startswith("full") else None,
            )
            for i in range(n)
        ]

    written = {cell: {task: records(cell, task) for task in tasks} for cell in cells}
    return load_run(write_run(folder, dict.fromkeys(tasks, "qa_f1"), written, **info))


def needle(folder: Path, cells: Sequence[str], lengths: Sequence[int], sampled: int) -> Run:
    """A grid of depths and lengths, of which the last were not sampled."""
    depths = range(0, 101, 10)

    def records(cell: str) -> list[Record]:
        return [
            record(
                f"{length}-{depth}",
                depth / 100,
                prompt_tokens=length - 133,
                budget_achieved=float(cell.rpartition("@")[2]),
                extra={"groups": {"length": length, "depth": depth}},
            )
            for length in lengths[:sampled]
            for depth in depths
        ]

    asked = {"lengths": list(lengths), "depths": list(depths)}
    config = {"limit": sampled * len(depths), "benchmark": asked}
    written = {cell: {"number": records(cell)} for cell in cells}
    return load_run(write_run(folder, {"number": "number"}, written, config=config))


SHAPES: Mapping[str, Any] = {
    "a comparison": lambda folder: made_up(folder),
    "21 long names": lambda folder: made_up(
        folder,
        ["full@1", *(f"{m}@{b}" for b in ("0.5", "0.35") for m in METHODS), f"{VARIANT}@0.35"],
        LONG,
        n=2,
    ),
    "one cell": lambda folder: made_up(folder, ["h2o@0.5"]),
    "the full cache alone": lambda folder: made_up(folder, ["full@1"]),
    "no full cache": lambda folder: made_up(folder, ["h2o@0.5", "h2o@256", "kvmerger@0.5"]),
    "one sample": lambda folder: made_up(folder, n=1),
    "many budgets": lambda folder: made_up(
        folder, ["full@1", *(f"{m}@{b / 20:g}" for b in range(1, 20) for m in METHODS[:2])], ["a", "b"]
    ),
    "five methods": lambda folder: made_up(folder, ["full@1", *(f"{m}@0.5" for m in METHODS[:5])]),
    "a needle": lambda folder: needle(folder, COMPARISON, (256, 512, 1024, 2048, 3500), 4),
    "a needle of many lengths": lambda folder: needle(folder, ["full@1"], range(300, 9000, 150), 58),
}


@dataclass
class Seen:
    """One figure as it was put on paper."""

    figure: Figure
    texts: list[tuple[str, Bbox, float]] = field(default_factory=list)
    """Each text that was drawn, its box in pixels and its size in points."""
    canvas: Bbox = field(default_factory=Bbox.unit)
    """All pixels."""


@dataclass
class Shown:
    """A run with its figures, by name."""

    run: Run
    drawn: Drawn
    seen: Mapping[str, Seen]

    def caption(self, name: str) -> str:
        return next(plot.caption for plot in self.drawn.plots if plot.name == name)

    def texts(self, name: str) -> list[str]:
        return [text for text, _, _ in self.seen[name].texts]


def show(run: Run, margin: float = 1.0) -> Shown:
    """Draw a run's figures and keep each with every text as it was put on paper."""
    found: list[Seen] = []
    save, draw_figure, draw_text = Figure.savefig, Figure.draw, Text.draw

    def saved(self: Figure, file: Any, **options: Any) -> None:
        if options["format"] == "png":
            found.append(Seen(self))
        save(self, file, **options)

    def figure_drawn(self: Figure, renderer: Any) -> None:
        if isinstance(renderer, RendererAgg):  # once to lay it out, and once for good
            found[-1].texts.clear()
            found[-1].canvas = Bbox.from_bounds(0, 0, renderer.width, renderer.height)
        draw_figure(self, renderer)

    def text_drawn(self: Text, renderer: Any, *more: Any, **options: Any) -> None:
        if self.get_visible() and self.get_text().strip() and isinstance(renderer, RendererAgg):
            box = self.get_window_extent(renderer)
            found[-1].texts.append((self.get_text(), box, self.get_fontsize()))
        draw_text(self, renderer, *more, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", saved)
        patch.setattr(Figure, "draw", figure_drawn)
        patch.setattr(Text, "draw", text_drawn)
        drawn = draw_all(run, looks([run]), Judgement(margin))
    names = [plot.name for plot in drawn.plots]
    return Shown(run, drawn, dict(zip(names, found, strict=True)))


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Shown:
    """A comparison of three methods at two budgets."""
    return show(made_up(tmp_path_factory.mktemp("comparison")))


def panels(figure: Figure) -> list[Axes]:
    return [axis for axis in figure.axes if axis.axison and axis.get_label() != "<colorbar>"]


def check_layout(name: str, one: Seen) -> None:
    """At the width of print no text is small, touches another, or leaves the figure."""
    width, _ = one.figure.get_size_inches()
    assert any(width == pytest.approx(known) for known in (COLUMN, PAGE)), name
    room = one.canvas.padded(1)
    for text, box, size in one.texts:
        assert size >= SMALL, (name, text)
        assert all(room.contains(*corner) for corner in (box.min, box.max)), (name, text, box)
    for (text, box, _), (other, beside, _) in combinations(one.texts, 2):
        shared = Bbox.intersection(box, beside)
        assert shared is None or min(shared.width, shared.height) < 2, (name, text, other)


def check_names(name: str, one: Seen) -> None:
    """A name goes on in the next line behind a mark that ends a part of it, or where a space was."""
    for text, _, _ in one.texts:
        lines = text.split("\n")
        for above, below in pairwise(lines):
            spaced = f"{above.split()[-1]} {below.split()[0]}" in SPACED
            whole = above[-1] in "_-:,−" or below[0] in "(−" or spaced
            assert whole, (name, text)


def check_axes(name: str, one: Seen) -> None:
    """Panels of one figure compare: they share a scale; rows of a forest differ, as pairs do."""
    assert len({axis.get_xlim() for axis in panels(one.figure)}) == 1, name
    if not name.startswith("contrasts"):
        assert len({axis.get_ylim() for axis in panels(one.figure)}) == 1, name


SPACED = {"Full cache"}
"""Names of two words."""


@pytest.mark.parametrize("shape", SHAPES)
def test_every_figure_can_be_read(shape: str, tmp_path: Path) -> None:
    for name, one in show(SHAPES[shape](tmp_path)).seen.items():
        check_layout(name, one)
        check_names(name, one)
        check_axes(name, one)


def test_names_break_at_spaces_first_and_never_within_a_word() -> None:
    assert wrap("passage_retrieval_en", 12) == "passage_\nretrieval_en"
    assert wrap("KVMerger − KVMerger (sigma=mean_distance)", 26) == (
        "KVMerger − KVMerger\n(sigma=mean_distance)"
    )
    assert wrap("repobench-p", 8) == "repobench-\np"
    assert wrap("supercalifragilistic", 5) == "supercalifragilistic"


def test_a_figure_holds_neither_its_title_nor_its_setting(shown: Shown) -> None:
    for plot in shown.drawn.plots:
        inside = " ".join(shown.texts(plot.name))
        for unwanted in (plot.title, "0123456789", "toy-1m"):
            assert unwanted not in inside
        assert "toy-1m on toy" in plot.caption
        assert "commit 0123456789" in plot.caption
        assert plot.alt.endswith(".")


def test_fonts_are_embedded_as_outlines(shown: Shown) -> None:
    for plot in shown.drawn.plots:
        objects = re.findall(rb"\d+ 0 obj\n(.*?)endobj", plot.pdf, re.DOTALL)
        fonts = [each for each in objects if re.search(rb"/Type /Font\s", each)]
        descriptors = [each for each in objects if b"/Type /FontDescriptor" in each]
        assert fonts
        assert descriptors
        assert all(b"/FontFile2" in each for each in descriptors)
        assert not any(b"/Type3" in each for each in fonts)
        # A composite font has its outlines through the one that it descends from.
        assert all(b"/FontDescriptor" in each for each in fonts if b"/Type0" not in each)


def test_equal_numbers_give_equal_bytes(shown: Shown, tmp_path: Path) -> None:
    again = show(made_up(tmp_path)).drawn
    for one, other in zip(shown.drawn.plots, again.plots, strict=True):
        assert (one.png, one.pdf) == (other.png, other.pdf), one.name


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("average_by_budget", [34.9, 49.9]),
        ("kl_by_budget", [34.9, 49.9]),
        ("average_by_memory", [16 * 0.35, 16 * 0.5]),
    ],
)
def test_points_stand_at_what_was_kept(shown: Shown, name: str, places: list[float]) -> None:
    for axis in panels(shown.seen[name].figure):
        (own,) = axis.containers
        np.testing.assert_allclose(sorted(own[0].get_xdata()), places, rtol=1e-6)


def test_there_is_a_tick_at_every_budget(shown: Shown) -> None:
    for axis in panels(shown.seen["average_by_budget"].figure):
        assert list(axis.get_xticks()) == [35, 50]
    assert {"35", "50"} <= set(shown.texts("average_by_budget"))


def test_a_missed_budget_has_a_tick_where_it_ended(tmp_path: Path) -> None:
    lines = {"t": [record("0", 0.5, budget_achieved=0.5)]}
    run = load_run(write_run(tmp_path, {"t": "qa_f1"}, {"h2o_sim_decode@0.35": lines}))
    (axis,) = panels(show(run).seen["average_by_budget"].figure)
    assert list(axis.get_xticks()) == [50]


def test_the_slots_that_panels_leave_hold_the_legend(tmp_path: Path) -> None:
    figure = show(SHAPES["five methods"](tmp_path)).seen["average_by_budget"].figure
    assert len(panels(figure)) == 5
    (rest,) = [axis for axis in figure.axes if not axis.axison]
    assert rest.get_legend() is not None


def test_columns_leave_the_fewest_slots_empty() -> None:
    assert [columns_of(count, 4) for count in range(1, 10)] == [1, 2, 3, 4, 3, 3, 4, 4, 3]


def test_scores_of_0_are_marks_on_a_whole_scale(tmp_path: Path) -> None:
    seen = show(made_up(tmp_path, tasks=["zero"])).seen
    for axis in panels(seen["scores_by_task"].figure):
        assert axis.get_xlim()[0] < 0
        assert axis.get_xlim()[1] > 100
        assert [bar[0].get_xdata()[0] for bar in axis.containers] == [0, 0, 0]
    for axis in panels(seen["average_by_budget"].figure):
        low, high = axis.get_ylim()
        assert low < 0
        assert high >= 20


def test_kl_has_the_interval_of_its_mean_over_tasks(shown: Shown) -> None:
    expected = {cell: scored.estimate() for cell, scored in kl_averages(shown.run).items()}
    of_cam = [expected[cell] for cell in ("cam@0.35", "cam@0.5")]
    axis = panels(shown.seen["kl_by_budget"].figure)[2]
    _, _, (bars,) = axis.containers[0]
    ends = [(segment[0][1], segment[1][1]) for segment in bars.get_segments()]
    np.testing.assert_allclose(ends, [(each.low, each.high) for each in of_cam])
    assert all(each.low < each.value < each.high for each in of_cam)


def test_one_sample_is_a_point_without_interval_and_has_no_verdict(tmp_path: Path) -> None:
    shown = show(made_up(tmp_path, n=1))
    for name in ("average_by_budget", "kl_by_budget", "scores_by_task"):
        assert "No intervals" in shown.caption(name)
    assert "none where a task has one sample" in shown.caption("contrasts")
    assert shown.texts("contrasts").count("no verdict") == 1
    words = {"first better", "second better", "unresolved", "equivalent"}
    assert words.isdisjoint(shown.texts("contrasts"))


def test_whiskers_of_an_unknown_interval_are_nothing() -> None:
    nan = float("nan")
    assert np.isnan(whiskers([Estimate(5.0, nan, nan)])).all()
    np.testing.assert_array_equal(whiskers([Estimate(5.0, 4.0, 7.0)]), [[1.0], [2.0]])


def test_what_is_not_recorded_is_named(tmp_path: Path) -> None:
    shown = show(made_up(tmp_path, kl=False))
    assert {"kl_by_budget", "contrasts_kl"}.isdisjoint(shown.seen)
    assert shown.drawn.notes == (
        "Not drawn: KL to the full cache against budget. KL to the full cache is not recorded.",
    )


def test_a_forest_shows_the_margin_and_what_it_leaves_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forest, "_MOST", 3)
    cells = ["full@1", "h2o@0.5", "cam@0.5", "snapkv@0.5", "kvmerger@0.5"]
    shown = show(made_up(tmp_path, cells), margin=3)
    caption = shown.caption("contrasts")
    assert "the margin of ±3 points" in caption
    assert "Of 6 contrasts 3 are drawn, those of KVMerger first; the table has the others." in caption
    labels = [text for text in shown.texts("contrasts") if " − " in text and "first" not in text]
    assert labels == ["H2O − KVMerger", "CaM − KVMerger", "SnapKV − KVMerger"]
    assert "margin, ±3" in shown.texts("contrasts")


def test_verdicts_differ_by_mark_and_not_by_colour_alone() -> None:
    assert len({style["marker"] for style in forest._MARKS.values()}) == len(forest._WORDS)


def test_a_length_that_a_limit_left_out_is_a_hatched_column(tmp_path: Path) -> None:
    shown = show(SHAPES["a needle"](tmp_path))
    assert "No samples of length 3500: limit=44 ends before." in shown.caption("heat_map_number")
    for axis in panels(shown.seen["heat_map_number"].figure):
        missing = np.ma.getmaskarray(axis.images[0].get_array())
        assert missing[:, 4].all()
        assert not missing[:, :4].any()
        assert axis.patch.get_hatch()
    assert {"123 (256)", "- (3500)"} <= set(shown.texts("heat_map_number"))
