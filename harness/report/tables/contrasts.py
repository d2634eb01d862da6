"""Contrasts with their verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from harness.report.contrasts import (
    AVERAGE,
    LEVEL,
    Contrast,
    contrasts,
    contrasts_by_task,
    without_kl,
)
from harness.report.divergence import KL
from harness.report.exchanges import exchanges_of
from harness.report.memory import TOLERANCE, beside_notes, unequal_text
from harness.report.noise import Floor, Found
from harness.report.run import Run
from harness.report.tables.table import Table, number, score_text, tidy
from harness.report.words import INTERVAL, gaps, setting, subject, task_label

WITHIN_NOISE = "‡"
"""Mark of a verdict on a contrast that is no larger than the noise."""
_NOT_LOOKED_FOR = Found(None, "")


def contrast_table(run: Run, margin: float, noise: Found = _NOT_LOOKED_FOR) -> Table | None:
    """Compare cells on the average and on KL; None where no two can be.

    Args:
        run: what was answered.
        margin: points within which two scores are equivalent.
        noise: the noise floor that stands beside, or why there is none.
    """
    lacking = without_kl(run)
    return _contrast_table(
        run,
        contrasts(run),
        margin,
        noise,
        name="contrasts",
        title="Contrasts on the average and on KL",
        about="KL to the full cache (nats, lower is better) has no margin, and no contrast with the "
        "full cache, whose own is 0 by definition",
        notes=[f"No contrast on KL, which is not recorded on every task: {', '.join(lacking)}."]
        if lacking
        else [],
    )


def contrast_by_task_table(run: Run, margin: float, noise: Found = _NOT_LOOKED_FOR) -> Table | None:
    """Compare cells on each task, with arguments as in `contrast_table`; None where no two can be."""
    return _contrast_table(
        run,
        contrasts_by_task(run),
        margin,
        noise,
        name="contrasts_by_task",
        title="Contrasts by task",
        about="Scores that are not of 0 to 100 have no margin",
    )


_CONTRAST_HEADER = (
    "on",
    "A",
    "B",
    "n",
    "A - B",
    "p",
    "adjusted p",
    "win/tie/loss",
    "SD over seeds A, B",
    "bytes A/B",
    "verdict",
)


def _contrast_table(
    run: Run,
    found: Sequence[Contrast],
    margin: float,
    noise: Found,
    *,
    name: str,
    title: str,
    about: str,
    notes: Sequence[str] = (),
) -> Table | None:
    if not found:
        return None
    family = sum(not np.isnan(contrast.p) for contrast in found)
    notes = [*gaps(run), *beside_notes(run), *notes, *([noise.note] if noise.note else [])]
    floor = noise.floor
    exchanges = exchanges_of(len(found))
    least = min(1.0, 2 * family / (exchanges + 1))
    if least >= LEVEL:
        notes.append(
            f"With {family} contrasts in one family, {exchanges:,} exchanges give no adjusted p below "
            f"{least:.2g}: nothing here can be better. Claims rest on the average."
        )
    return Table(
        name=name,
        title=title,
        caption=f"Score of A minus score of B: {setting(run)}. In brackets: {INTERVAL}, paired by "
        f"sample id. p: sign-flip permutation test over samples, {exchanges:,} exchanges (all where "
        f"fewer), adjusted by Holm over the {family} contrasts of this table. Better: adjusted p below "
        f"{LEVEL:g}. Equivalent: 90% interval within {margin:g} points of 0. Unresolved: neither; in "
        "brackets the samples that would narrow the interval to the margin, if further ones scatter "
        "as these do (its width falls with the root of their number). Win: a sample on which A is "
        "better. Bytes: those of keys, values, sizes and biases; where they differ by more than "
        f"{TOLERANCE:.0%} at one budget, the verdict says so. {about}."
        + (f" {WITHIN_NOISE}: within noise, no larger than the noise beside it." if floor else ""),
        header=(*_CONTRAST_HEADER[:-1], *(["noise"] if floor else []), _CONTRAST_HEADER[-1]),
        rows=tuple(_contrast_row(run, contrast, margin, floor) for contrast in found),
        notes=tuple(notes),
        data=tidy(
            run,
            [_contrast_data(contrast, margin, floor) for contrast in found],
            list(_contrast_data(found[0], margin, floor)),
        ),
        subject=subject(run),
        naming=(1, 2),
    )


def _contrast_row(run: Run, contrast: Contrast, margin: float, floor: Floor | None) -> tuple[str, ...]:
    label = {AVERAGE: AVERAGE, KL: "KL to full"}.get(contrast.task)
    spreads = ", ".join(number(spread, ".2f") or "-" for spread in contrast.spreads)
    return (
        label or task_label(run, contrast.task),
        contrast.first,
        contrast.second,
        f"{contrast.n}\n({contrast.contexts} contexts)"
        if contrast.contexts < contrast.n
        else str(contrast.n),
        score_text(contrast, "+") if contrast.task != KL else _kl_text(contrast),
        number(contrast.p, ".4f"),
        number(contrast.p_adjusted, ".4f"),
        f"{contrast.wins}/{contrast.ties}/{contrast.losses}",
        "" if all(np.isnan(contrast.spreads)) else spreads,
        number(contrast.bytes_ratio, ".3f"),
        *(
            [number(floor.noise(contrast.task), ".4f" if contrast.task == KL else ".2f")]
            if floor
            else []
        ),
        verdict_text(contrast, margin, floor),
    )


def _kl_text(contrast: Contrast) -> str:
    low, high = contrast.interval
    text = f"{contrast.value:+.4f}"
    return text if np.isnan(low) else f"{text}\n[{low:.4f}, {high:.4f}]"


def verdict_text(contrast: Contrast, margin: float, floor: Floor | None = None) -> str:
    """Return a verdict in words, marked within noise, with the samples that would resolve it and, where
    the cells of one budget do not store as many bytes, by how much.

    Empty where there is none.
    """
    verdict = contrast.verdict(margin)
    if verdict is None:
        return ""
    needed = contrast.needed(margin)
    mark = f" {WITHIN_NOISE}" if floor and floor.covers(contrast) else ""
    remarks = [f"{needed:,} samples"] if needed else []
    remarks += [unequal_text(contrast.bytes_ratio)] if contrast.is_unequal else []
    return f"{verdict}{mark}" + (f"\n[{'; '.join(remarks)}]" if remarks else "")


def _contrast_data(contrast: Contrast, margin: float, floor: Floor | None) -> dict[str, Any]:
    low, high = contrast.interval
    low_90, high_90 = contrast.narrow
    verdict = contrast.verdict(margin)
    noise = floor.noise(contrast.task) if floor else np.nan
    return {
        "task": contrast.task,
        "a": contrast.first,
        "b": contrast.second,
        "n": contrast.n,
        "contexts": contrast.contexts,
        "difference": contrast.value,
        "ci_low": low,
        "ci_high": high,
        "ci90_low": low_90,
        "ci90_high": high_90,
        "p": contrast.p,
        "p_adjusted": contrast.p_adjusted,
        "wins": contrast.wins,
        "ties": contrast.ties,
        "losses": contrast.losses,
        "seed_sd_a": contrast.spreads[0],
        "seed_sd_b": contrast.spreads[1],
        "bytes_ratio": contrast.bytes_ratio,
        "margin": margin if contrast.in_points else np.nan,
        "verdict": str(verdict or ""),
        "samples_needed": contrast.needed(margin),
        "noise": noise,
        "below_noise": floor.covers(contrast) if floor and not np.isnan(noise) else None,
    }
