"""What a run was made to find out, answered in sentences with their intervals.

Asked of KVMerger where the run has it, otherwise of every method that compresses. Nothing is counted
here: the sentences say what `harness.report.contrasts` found, with its verdicts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import isnan

from harness.judgement import Judgement
from harness.report.contrasts import (
    AVERAGE,
    KL,
    LEVEL,
    Contrast,
    Verdict,
    contrasts,
    contrasts_by_task,
    without_kl,
)
from harness.report.exchanges import exchanges_of
from harness.report.gates import gates, outside
from harness.report.memory import beside_notes
from harness.report.missed import missed_budgets
from harness.report.names import budget_label, method_label
from harness.report.noise import find_floor
from harness.report.published import Reference
from harness.report.run import Run
from harness.report.words import count_tasks, gaps
from kvmerge.names import parse_name

_FEW = 3
"""Methods that the short answer is given for, where none of them is KVMerger."""
_MOST = 8
"""Tasks or pairs that a sentence lists."""


class Tone(StrEnum):
    """What a line says of the method that is asked about."""

    BETTER = "better"
    BEHIND = "behind"
    EQUAL = "equivalent"
    OPEN = "unresolved"
    UNKNOWN = "cannot be said"
    NOTE = "note"


@dataclass(frozen=True)
class Line:
    """One sentence of an answer."""

    tone: Tone
    text: str


@dataclass(frozen=True)
class Answer:
    """A question with what the run says to it; never without a line."""

    question: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Seen:
    """A contrast as one of its two cells sees it."""

    contrast: Contrast
    cell: str
    tone: Tone
    text: str
    """The difference with its interval, and what makes it sure or not."""

    @property
    def other(self) -> str:
        """The cell that it is compared with."""
        contrast = self.contrast
        return contrast.second if self.cell == contrast.first else contrast.first


def answers(run: Run, judgement: Judgement, references: Iterable[Reference] = ()) -> list[Answer]:
    """Answer what is asked of a run, from its contrasts; last, say what they leave open."""
    asked = _asked(run)
    on_average = _on_average(run)
    found = [
        _keeping_up(run, asked, on_average, judgement),
        _against_others(run, asked, on_average, judgement),
        _by_task(run, asked, judgement),
        _open(run, on_average, judgement, references),
    ]
    return [Answer(question, tuple(lines)) for question, lines in found if lines]


def in_short(run: Run, judgement: Judgement) -> str:
    """Return the answers on the average in one or two sentences; empty where nothing is compared."""
    on_average = [one for one in _on_average(run) if one.task == AVERAGE]
    sentences = []
    for variant in _asked(run)[:_FEW]:
        against: dict[Tone, dict[str, list[str]]] = {tone: {} for tone in _IN_SHORT}
        cells = _cells(run, variant)
        seen = [one for cell in cells for one in _seen_by(cell, on_average, judgement)]
        for one in sorted(seen, key=lambda one: one.other != run.full_cell):
            at = against[one.tone].setdefault(_method(run, one.other), [])
            at.append(_budget(one.cell))
        parts = [
            f"{_IN_SHORT[tone]} {_listed([f'{who} (at {_listed(at)})' for who, at in others.items()])}"
            for tone, others in against.items()
            if others
        ]
        if parts:
            sentences.append(f"On the average {method_label(variant)} {'; it '.join(parts)}.")
    return " ".join(sentences)


_IN_SHORT = {
    Tone.BETTER: "is better than",
    Tone.BEHIND: "is behind",
    Tone.EQUAL: "is equivalent to",
    Tone.OPEN: "cannot be told from",
    Tone.UNKNOWN: "has too few samples against",
}


def _asked(run: Run) -> list[str]:
    """Return the variants that questions are asked of: KVMerger's first one, or all that compress."""
    names = [parse_name(cell) for cell in run.cells if cell != run.full_cell]
    ours = [name.variant for name in names if name.method == "kvmerger"]
    ours += [name.variant for name in names if name.method.startswith("kvmerger")]
    return ours[:1] or list(dict.fromkeys(name.variant for name in names))


def _on_average(run: Run) -> list[Contrast]:
    """Return the contrasts that answers rest on: the average's, and of tasks that it leaves out."""
    apart = [one for one in contrasts_by_task(run) if one.task not in run.averaged_tasks]
    return [*(one for one in contrasts(run) if one.task == AVERAGE), *apart]


Found = tuple[str, list[Line]]


def _keeping_up(
    run: Run, asked: Sequence[str], found: Sequence[Contrast], judgement: Judgement
) -> Found:
    full = run.full_cell
    who = method_label(asked[0]) if len(asked) == 1 else "any method"
    question = f"Does {who} keep up with the full cache?"
    if full is None:
        why = "The run has no full cache (full@1), so nothing says what compression costs."
        return question, [Line(Tone.UNKNOWN, why)]
    lines = [
        Line(seen.tone, f"{_cell(run, cell)}: {seen.text}")
        for variant in asked
        for cell in _cells(run, variant)
        for seen in _seen_by(cell, found, judgement)
        if seen.other == full
    ]
    others = [cell for cell in run.cells if cell != full and parse_name(cell).variant not in asked]
    by_tone: dict[Tone, list[str]] = {}
    for cell in others:
        for seen in _seen_by(cell, found, judgement):
            if seen.other == full and seen.contrast.task == AVERAGE:
                by_tone.setdefault(seen.tone, []).append(f"{_cell(run, cell)} {_difference(seen)}")
    for tone, cells in by_tone.items():
        lines.append(Line(tone, f"Of the other methods: {_few(cells)}."))
    if not lines:
        why = "No cell has samples of every task in common with the full cache, so there is no average."
        lines.append(Line(Tone.UNKNOWN, why))
    return question, lines


def _against_others(
    run: Run, asked: Sequence[str], found: Sequence[Contrast], judgement: Judgement
) -> Found:
    between = [one for one in found if one.second != run.full_cell]
    if len(asked) == 1:
        lines = [
            Line(seen.tone, f"At {_budget(cell)} against {_method(run, seen.other)}: {seen.text}")
            for cell in _cells(run, asked[0])
            for seen in _seen_by(cell, between, judgement)
        ]
        lines += _kl_lines(run, asked[0], judgement)
        return f"Is {method_label(asked[0])} better than the other methods?", lines
    sure = sorted(between, key=lambda one: one.p_adjusted)
    seen_first = [_seen(one, one.first, judgement) for one in sure]
    decided = [seen for seen in seen_first if seen.tone in (Tone.BETTER, Tone.BEHIND, Tone.EQUAL)]
    lines = [
        Line(seen.tone, f"{_cell(run, seen.cell)} against {_method(run, seen.other)}: {seen.text}")
        for seen in decided[:_MOST]
    ]
    if between and not decided:
        lines.append(Line(Tone.OPEN, f"None of {len(between)} contrasts at equal budgets is resolved."))
    return "Which method is better at the same budget?", lines


def _kl_lines(run: Run, variant: str, judgement: Judgement) -> Iterator[Line]:
    """Yield, for each budget, what KL to the full cache says where it says anything sure."""
    divergence = [one for one in contrasts(run) if one.task == KL]
    for cell in _cells(run, variant):
        for tone, word in (
            (Tone.BETTER, "closer to the full cache than"),
            (Tone.BEHIND, "further than"),
        ):
            named = [
                f"{_method(run, seen.other)} ({_difference(seen)})"
                for seen in _seen_by(cell, divergence, judgement)
                if seen.tone is tone
            ]
            if named:
                yield Line(tone, f"At {_budget(cell)}, by KL: {word} {_few(named)}.")


def _by_task(run: Run, asked: Sequence[str], judgement: Judgement) -> Found:
    found = [one for one in contrasts_by_task(run) if one.task in run.averaged_tasks]
    lines = []
    for variant in asked:
        for cell in _cells(run, variant):
            by_other: dict[str, list[Seen]] = {}
            for seen in _seen_by(cell, found, judgement):
                by_other.setdefault(seen.other, []).append(seen)
            lines += [_on_tasks(run, cell, other, of) for other, of in by_other.items()]
    return "On which tasks?", lines if len(run.averaged_tasks) > 1 else []


def _on_tasks(run: Run, cell: str, other: str, seen: Sequence[Seen]) -> Line:
    tones = {tone: [one for one in seen if one.tone is tone] for tone in Tone}
    parts = [
        f"{tone} on {_few([f'{one.contrast.task} ({_difference(one)})' for one in tones[tone]])}"
        for tone in (Tone.BETTER, Tone.BEHIND, Tone.EQUAL)
        if tones[tone]
    ]
    left = len(tones[Tone.OPEN]) + len(tones[Tone.UNKNOWN])
    if left:
        parts.append(f"unresolved on {left} of {count_tasks(len(seen))}")
    sure = [tone for tone in (Tone.BETTER, Tone.BEHIND, Tone.EQUAL) if tones[tone]]
    tone = sure[0] if len(sure) == 1 else Tone.NOTE if sure else Tone.OPEN
    return Line(tone, f"{_cell(run, cell)} against {_method(run, other)}: {'; '.join(parts)}.")


def _open(
    run: Run, found: Sequence[Contrast], judgement: Judgement, references: Iterable[Reference]
) -> Found:
    """Say what stays open, and why."""
    lines = [Line(Tone.UNKNOWN, text) for text in _few_samples(run)]
    beyond = outside(gates(run, references))
    if beyond:
        lines.append(
            Line(
                Tone.UNKNOWN,
                f"The full cache is outside its published band on {_few(sorted(beyond))}: what is said "
                "of these is no reproduction.",
            )
        )
    unresolved = [one for one in found if one.verdict(judgement.margin) is Verdict.UNRESOLVED]
    if unresolved:
        named = [
            f"{_cell(run, one.first)} against {_method(run, one.second)}"
            + (f" ({needed:,} samples)" if (needed := one.needed(judgement.margin)) else "")
            for one in unresolved
        ]
        lines.append(
            Line(
                Tone.OPEN,
                f"Unresolved are {len(unresolved)} of {len(found)} contrasts: {_few(named)}. In "
                "brackets the samples over all tasks that would narrow the interval to the margin of "
                f"{_points(judgement.margin)} either way, if further ones scatter as these do.",
            )
        )
    floor = find_floor(run, judgement).floor
    within = [one for one in found if floor is not None and floor.covers(one)]
    if within:
        named = [f"{_cell(run, one.first)} against {_method(run, one.second)}" for one in within]
        lines.append(
            Line(
                Tone.UNKNOWN,
                f"Within noise are {len(within)} of {len(found)} contrasts: {_few(named)}. They are no "
                "larger than what another batch size, other threads, kernels or dtypes alone changed.",
            )
        )
    by_task = [one for one in contrasts_by_task(run) if not isnan(one.p)]
    if by_task:
        unsure = sum(one.verdict(judgement.margin) is Verdict.UNRESOLVED for one in by_task)
        lines.append(
            Line(
                Tone.NOTE,
                f"On single tasks {unsure:,} of {len(by_task):,} contrasts are unresolved. As "
                f"{len(by_task):,} are made together, the surest of them counts only with p below "
                f"{LEVEL / len(by_task):.2g}: a difference on one task has to be large to be seen.",
            )
        )
        if 2 * len(by_task) / (exchanges_of(len(by_task)) + 1) >= LEVEL:
            lines.append(
                Line(
                    Tone.UNKNOWN,
                    "With so many contrasts by task the permutation test cannot decide any.",
                )
            )
    lacking = without_kl(run)
    if lacking:
        lines.append(Line(Tone.UNKNOWN, f"KL to the full cache is not recorded for {_few(lacking)}."))
    lines += [Line(Tone.UNKNOWN, text) for text in (*gaps(run), *beside_notes(run))]
    tokens = run.values("prompt_tokens")
    if tokens:
        lines.append(
            Line(
                Tone.NOTE,
                f"All this is of {run.model} on {run.benchmark}, with prompts of {min(tokens):,} to "
                f"{max(tokens):,} tokens: of other models, tasks and lengths it says nothing.",
            )
        )
    return "What cannot be said?", lines


def _few_samples(run: Run) -> Iterator[str]:
    """Yield what one sample or context a task, or none, leaves unknown."""
    if not run.records:
        yield "Nothing: the run has no record yet."
    single = [
        task
        for task in run.tasks
        if (counts := [len(s.clusters) for (of, _), s in run.samples.items() if of == task])
        and min(counts) < 2
    ]
    if single:
        yield (
            f"One sample gives no interval and no verdict: {_few(single)}"
            + (", and so no average either." if set(single) & set(run.averaged_tasks) else ".")
        )


def _seen_by(cell: str, found: Iterable[Contrast], judgement: Judgement) -> list[Seen]:
    return [_seen(one, cell, judgement) for one in found if cell in (one.first, one.second)]


def _seen(contrast: Contrast, cell: str, judgement: Judgement) -> Seen:
    tone = {
        None: Tone.UNKNOWN,
        Verdict.EQUIVALENT: Tone.EQUAL,
        Verdict.UNRESOLVED: Tone.OPEN,
        Verdict.FIRST: Tone.BETTER if cell == contrast.first else Tone.BEHIND,
        Verdict.SECOND: Tone.BEHIND if cell == contrast.first else Tone.BETTER,
    }[contrast.verdict(judgement.margin)]
    seen = Seen(contrast, cell, tone, "")
    where = "" if contrast.task == AVERAGE else f" on {contrast.task}"
    needed = contrast.needed(judgement.margin)
    why = {
        Tone.UNKNOWN: "one sample a task, so no interval and no verdict",
        Tone.EQUAL: f"equivalent within {_points(judgement.margin)}",
        Tone.OPEN: f"not resolved, {_p(contrast)}"
        + (f"; about {needed:,} samples would tell (now {contrast.n:,})" if needed else ""),
    }.get(tone, f"{tone}, {_p(contrast)}")
    return Seen(contrast, cell, tone, f"{_difference(seen)}{where}; {why}.")


def _difference(seen: Seen) -> str:
    """Return the cell's score minus the other's, with its unit and interval."""
    contrast = seen.contrast
    sign = 1 if seen.cell == contrast.first else -1
    unit = " points" if contrast.in_points else " nats" if contrast.task == KL else ""
    digits = 1 if contrast.in_points else 3
    ends = sorted(sign * end for end in contrast.interval)
    interval = "" if isnan(ends[0]) else f" [{_signed(ends[0], digits)}, {_signed(ends[1], digits)}]"
    return f"{_signed(sign * contrast.value, digits)}{unit}{interval}"


def _signed(value: float, digits: int) -> str:
    """Return a number with its sign, the minus as it is printed."""
    return f"{value:+.{digits}f}".replace("-", "−")


def _points(margin: float) -> str:
    return f"{margin:g} point{'s' * (margin != 1)}"


def _p(contrast: Contrast) -> str:
    p = contrast.p_adjusted
    return "adjusted p < 0.001" if p < 0.001 else f"adjusted p = {p:.3f}"


def _cells(run: Run, variant: str) -> list[str]:
    return [cell for cell in run.cells if parse_name(cell).variant == variant]


def _cell(run: Run, cell: str) -> str:
    """Name a cell as people say it: `KVMerger at 35%`, with what it kept where that was not it."""
    kept = missed_budgets(run).get(cell)
    return f"{method_label(parse_name(cell).variant)} at {_budget(cell)}" + (
        f" ({kept})" if kept else ""
    )


def _method(run: Run, cell: str) -> str:
    """Name a cell by its method alone, where its budget is said already."""
    if cell == run.full_cell:
        return "the full cache"
    kept = missed_budgets(run).get(cell)
    return method_label(parse_name(cell).variant) + (f" ({kept})" if kept else "")


def _budget(cell: str) -> str:
    return budget_label(parse_name(cell).budget)


def _few(texts: Sequence[str]) -> str:
    """List texts, the first of them only where they are many."""
    shown = list(texts[:_MOST])
    return _listed([*shown, f"{len(texts) - _MOST} more"] if len(texts) > _MOST else shown)


def _listed(texts: Sequence[str]) -> str:
    """Return `a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, (", ".join(texts[:-1]), texts[-1])))
