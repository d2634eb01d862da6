"""Write and print what a run that observes has found, from its records alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.console import Console

from harness.report.observed.claims import REFUTED, SUPPORTED, UNDECIDED, Claim, claims
from harness.report.observed.figures import draw_observed
from harness.report.observed.run import ObservedRun
from harness.report.observed.tables import all_tables
from harness.report.summary import to_csv
from kvmerge.files import write_atomically

_STYLE = {SUPPORTED: "green", REFUTED: "red", UNDECIDED: "yellow"}
_PLAIN: Any = {"markup": False, "highlight": False}


def write_observed(run: ObservedRun, out: Path | None = None) -> list[Claim]:
    """Write tables/ and plots/ of a run, by default into its own folder; return how claims fare."""
    out = out or run.output_dir
    judged = claims(run)
    for name, frame in all_tables(run, judged).items():
        write_atomically(out / "tables" / f"{name}.csv", to_csv(frame))
    for plot in draw_observed(run):
        plot.write(out / "plots")
    return judged


def print_claims(run: ObservedRun, judged: list[Claim], console: Console) -> None:
    """Print each claim of the paper with its verdict and the numbers behind it."""
    for claim in judged:
        console.print(f"{claim.verdict:<10} {claim.statement}", style=_STYLE[claim.verdict], **_PLAIN)
        console.print(f"    {claim.quantity}: {number(claim)}; needed: {claim.rule}", **_PLAIN)
        console.print(f"    {claim.evidence}", style="dim", **_PLAIN)
    console.print(f"{run.setting()}.", style="dim", **_PLAIN)
    for note in run.info.get("notes", []):
        console.print(note, style="yellow", **_PLAIN)


def number(claim: Claim) -> str:
    """Return a claim's number with its interval."""
    shown = claim.value
    if math.isnan(shown.value):
        return "unknown"
    interval = "" if math.isnan(shown.low) else f" [{shown.low:.3f}, {shown.high:.3f}]"
    return f"{shown.value:.3f}{interval}"
