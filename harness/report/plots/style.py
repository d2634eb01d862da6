"""One style for every figure: drawn at the width that it is printed in, legible in grey.

Colours are Okabe and Ito's, which survive colour blindness, each with a marker of its own, so that
nothing is told by colour alone. A figure holds no title and no setting: its caption does.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.textpath import TextPath

from harness.report.bootstrap import Estimate
from harness.report.names import method_label
from harness.report.run import Run
from harness.report.words import INTERVAL
from kvmerge.files import write_atomically
from kvmerge.names import parse_name

COLUMN, PAGE = 88 / 25.4, 180 / 25.4
"""Inches: a column of a two-column paper, and its whole text."""
SMALL, TEXT = 7.0, 7.5
"""Points: ticks, legends and numbers; labels and the names of panels. No text is smaller."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
INK = "#222222"
REFERENCE, BAND = "#444444", "#dedede"
"""The full cache's line, and its interval."""
PALE = "#c4c4c4"
"""What stands behind, for comparison."""
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": TEXT,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": INK,
    "axes.labelsize": TEXT,
    "axes.linewidth": 0.6,
    "axes.titlelocation": "left",
    "axes.titlepad": 4,
    "axes.titlesize": TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "figure.constrained_layout.h_pad": 0.03,
    "figure.constrained_layout.w_pad": 0.03,
    "figure.labelsize": TEXT,
    "grid.color": "#e8e8e8",
    "grid.linewidth": 0.6,
    "legend.borderaxespad": 0,
    "legend.borderpad": 0.2,
    "legend.columnspacing": 1.4,
    "legend.fontsize": SMALL,
    "legend.frameon": False,
    "legend.handletextpad": 0.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 4.5,
    "errorbar.capsize": 1.5,
    "text.color": INK,
    "xtick.color": INK,
    "xtick.labelsize": SMALL,
    "xtick.major.size": 2.5,
    "xtick.major.width": 0.6,
    "ytick.color": INK,
    "ytick.labelsize": SMALL,
    "ytick.major.size": 2.5,
    "ytick.major.width": 0.6,
    "pdf.fonttype": 42,
}
"""Type 42 embeds the letters that are used as TrueType outlines, which every publisher takes."""
_DPI = 300
_HANDLE = 34.0
"""Points that a legend spends beside each text: its mark and the space around it."""


@dataclass(frozen=True)
class Plot:
    """One figure, drawn."""

    name: str
    """File name without ending."""
    title: str
    caption: str
    """What is drawn, on what it was measured, and what is missing."""
    alt: str
    """What is seen, in a sentence for those who cannot see it."""
    png: bytes
    pdf: bytes

    def write(self, folder: Path) -> None:
        """Write `<name>.png` and `<name>.pdf`."""
        write_atomically(folder / f"{self.name}.png", self.png)
        write_atomically(folder / f"{self.name}.pdf", self.pdf)


@dataclass(frozen=True)
class Undrawn:
    """A figure that a run has no numbers for."""

    title: str
    reason: str

    def __str__(self) -> str:
        return f"Not drawn: {self.title}. {self.reason}"


@dataclass(frozen=True)
class Look:
    """How a method is drawn."""

    colour: str
    marker: str
    label: str


def looks(runs: Iterable[Run]) -> dict[str, Look]:
    """Choose for each method one look for a whole report, in order of first appearance."""
    names = dict.fromkeys(parse_name(cell).variant for run in runs for cell in run.cells)
    others = [name for name in names if name != "full"]
    return {"full": Look(REFERENCE, "X", method_label("full"))} | {
        name: Look(
            COLOURS[i % len(COLOURS)],
            MARKERS[(i + i // len(COLOURS)) % len(MARKERS)],
            method_label(name),
        )
        for i, name in enumerate(others)
    }


def variants(cells: Iterable[str]) -> list[str]:
    """Return the methods of some cells with their options, in order of first appearance."""
    return list(dict.fromkeys(parse_name(cell).variant for cell in cells))


def is_full(cell: str) -> bool:
    """Tell whether a cell is the full cache, which is drawn as a reference."""
    return parse_name(cell).method == "full"


def wrap(label: str, width: int) -> str:
    """Break a name at spaces, and what is longer than `width` letters behind `_`, `-`, `:` or `,` too.

    Never within a word, however long that is.
    """
    lines = [""]
    for word in label.split(" "):
        parts = [word] if len(word) <= width else re.findall(r"[^_\-:,]+[_\-:,]*|[_\-:,]+", word)
        for place, part in enumerate(parts):
            longer = lines[-1] + (" " if place == 0 and lines[-1] else "") + part
            if lines[-1] and len(longer) > width:
                lines.append(part)
            else:
                lines[-1] = longer
    return "\n".join(lines)


def text_width(text: str, size: float = SMALL) -> float:
    """Return the width of a text's widest line, in points."""
    font = FontProperties(family=STYLE["font.family"])
    return max(
        TextPath((0, 0), line, size=size, prop=font).get_extents().width if line.strip() else 0.0
        for line in text.split("\n")
    )


def whiskers(shown: Sequence[Estimate]) -> np.ndarray:
    """Return the lengths below and above the values, `(2, n)`; NaN draws nothing."""
    lengths = np.array([[e.value - e.low for e in shown], [e.high - e.value for e in shown]])
    # A percentile interval need not hold the value of the sample it was drawn from.
    return np.clip(lengths, 0, None)


def intervals(shown: Iterable[Estimate], what: str) -> str:
    """Say what the bars of a figure are, or why there are none."""
    if all(np.isnan(each.low) for each in shown):
        return "No intervals: these take two samples of every task."
    return f"{what}: {INTERVAL}."


def columns_of(panels: int, most: int) -> int:
    """Return how many panels stand side by side: with the fewest empty slots, then the most of them."""
    if panels <= most:
        return panels
    return min(range(max(2, most - 2), most + 1), key=lambda n: (-panels % n, -n))


def grid(figure: Figure, panels: int, columns: int, **shared: Any) -> tuple[list[Axes], Axes | None]:
    """Return an axis for each panel, row by row, and one that spans what the last row leaves empty."""
    rows = -(-panels // columns)
    spec = figure.add_gridspec(rows, columns)
    axes: list[Axes] = []
    for place in range(panels):
        with_first = {name: axes[0] for name in shared if axes and shared[name]}
        axes.append(figure.add_subplot(spec[divmod(place, columns)], **with_first))
    left = panels % columns
    if not left:
        return axes, None
    rest = figure.add_subplot(spec[rows - 1, left:])
    rest.axis("off")
    return axes, rest


def legend(figure: Figure, entries: Sequence[tuple[Any, str]], place: Axes | None = None) -> None:
    """Put a legend into an empty slot, or above the panels in as many columns as there is room for."""
    handles, labels = [handle for handle, _ in entries], [label for _, label in entries]
    if place is not None:
        place.legend(handles, labels, loc="center left")
        return
    widths = [text_width(label) + _HANDLE for label in labels]
    room = 72 * figure.get_figwidth()
    columns = next(
        (
            count
            for count in range(len(labels), 1, -1)
            if sum(column.max() for column in np.array_split(widths, count)) <= room
        ),
        1,
    )
    figure.legend(handles, labels, loc="outside upper center", ncols=columns)


def mark(look: Look) -> Artist:
    """Return a method's entry of a legend."""
    return Line2D([], [], color=look.colour, marker=look.marker, linestyle="none")


def reference_mark() -> tuple[Artist, Artist]:
    """Return the full cache's entry of a legend: its line on its interval."""
    return Patch(facecolor=BAND), Line2D([], [], color=REFERENCE, linestyle=(0, (4, 2)))


def render(figure: Figure, name: str, title: str, caption: str, alt: str) -> Plot:
    """Return a finished figure as files' contents."""
    png, pdf = io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png", dpi=_DPI)
    figure.set_layout_engine("none")  # it is laid out: doing so again takes as long as drawing
    # Without its date a file changes only where the numbers do.
    figure.savefig(pdf, format="pdf", metadata={"CreationDate": None})
    return Plot(name, title, caption, alt, png.getvalue(), pdf.getvalue())
