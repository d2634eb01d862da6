"""What is looked at before a long run: small checks that each end in a sentence.

They compare the run's own parts with something else: prompts with token ids recorded before, the
engine with plain transformers, what a cell keeps with its budget, scores with published ones. A check
passes, fails, or does not apply, and says why; it never passes for want of something to compare with.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.encoding import encode_truncating_middle
from benchmarks.task import PromptFormat, Task
from harness.report.gates import Gate, Verdict
from harness.settings import Settings
from kvmerge.budget import Budget
from kvmerge.cells import Cell
from kvmerge.engine import Comparison, Decoder, Stop
from kvmerge.families import local_windows
from kvmerge.hook import hooked
from kvmerge.models import DTYPES
from kvmerge.proof import UnprovenError
from kvmerge.session import Policy, Row, RowStats

_GOLDEN = Path(__file__).with_name("golden_prompts.json")
"""Texts, and the token ids that each model's prompt format makes of them."""
_ROUNDING = {torch.float32: 2.0**-19, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Relative error of one rounded sum: half a unit in the last place; in float32 more, since there the
products' own sums of thousands of terms round no finer than their result."""


class Status(StrEnum):
    """How a check ends."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_APPLICABLE = "not applicable"


@dataclass(frozen=True)
class Check:
    """One check after it was made."""

    name: str
    looked_at: str
    status: Status
    found: str
    """What was found, a sentence without its full stop."""


@dataclass(frozen=True)
class Prompt:
    """One sample's prompt as the model is fed it."""

    name: str
    """`<task>/<sample>`."""
    sample_id: str
    """Seeds the methods that draw, as in a run."""
    task: Task
    ids: Tensor
    """`(1, T)`."""
    stop_ids: frozenset[int]
    """Tokens that end an answer."""

    @property
    def length(self) -> int:
        """Prompt tokens."""
        return self.ids.shape[1]


@dataclass(frozen=True)
class Answer:
    """What follows a prompt, of a fixed length: end tokens end nothing here."""

    tokens: list[int]
    """Greedy choices."""
    logits: Tensor
    """`(n, vocabulary)` float32 before each token of the text that was fed."""
    stats: RowStats | None = None
    """What was kept of the prompt; None of plain transformers."""


# --- answers


@torch.inference_mode()
def plain_answer(model: PreTrainedModel, prompt: Prompt, count: int) -> Answer:
    """Answer by transformers' own `generate`, greedily and with no other setting of the checkpoint."""
    own = model.generation_config
    model.generation_config = GenerationConfig()  # without penalties, which no benchmark applies
    try:
        out: Any = model.generate(  # type: ignore[operator]
            prompt.ids,
            attention_mask=torch.ones_like(prompt.ids),
            do_sample=False,
            max_new_tokens=count,
            output_logits=True,
            return_dict_in_generate=True,
        )
    finally:
        model.generation_config = own
    return Answer(out.sequences[0, prompt.length :].tolist(), torch.cat(out.logits).float())


@torch.inference_mode()
def engine_answers(
    model: PreTrainedModel,
    rows: Sequence[Row],
    prompt: Prompt,
    count: int,
    policy: Policy,
    text: Sequence[int] | None = None,
) -> list[Answer]:
    """Answer by the engine with rows that share a prefill.

    Args:
        model: the model.
        rows: the rows; one that alters its prefill must be alone.
        prompt: the prompt.
        count: tokens of the answer, at least 2.
        policy: the switches of all rows.
        text: `count` token ids that `logits` go along; None: the first row's own answer.
    """
    with hooked(model):
        comparison = Comparison(model, rows, prompt.sample_id, policy=policy)
        first = comparison.prefill(prompt.ids, count)
        decoder = Decoder([comparison])
        tokens = decoder.decode(Stop(count, frozenset()))[0]
        parts = decoder.replay([tokens[0] if text is None else text])
        rest = torch.cat([of_rows.float() for (of_rows,) in parts], dim=1)
    logits = torch.cat([first.expand(len(rows), 1, -1), rest], dim=1)
    return [
        Answer(chosen, of_row, stats)
        for chosen, of_row, stats in zip(tokens, logits, comparison.stats, strict=True)
    ]


def cell_answers(
    model: PreTrainedModel, settings: Settings, prompt: Prompt, count: int
) -> dict[str, Answer]:
    """Answer a prompt with every cell of a run, its full cell first; `logits` go along its answer."""
    cells = sorted(settings.cells, key=lambda cell: not cell.is_full)
    shared = [cell for cell in cells if not cell.method.alters_prefill]

    def answers(of: Sequence[Cell], text: Sequence[int] | None) -> dict[str, Answer]:
        rows = [settings.row(cell, settings.seed) for cell in of]
        found = engine_answers(model, rows, prompt, count, settings.policy, text)
        return dict(zip((cell.name for cell in of), found, strict=True))

    found = answers(shared, None)
    text = found[cells[0].name].tokens
    for cell in cells:
        if cell not in shared:
            found |= answers([cell], text)
    return found


def rounding(settings: Settings, model: PreTrainedModel, logits: Tensor) -> float:
    """Return by how much two ways to compute logits may differ without one being wrong.

    Each layer adds two sums to the hidden states, and each is rounded: over `L` layers errors grow as
    `sqrt(2 L)`, relative to the largest logit. SmolLM2-135M differs by half of this in bfloat16 and by
    an eighth in float32.
    """
    layers = len(local_windows(model.config))
    unit = _ROUNDING[DTYPES[settings.model.dtype]]
    return unit * math.sqrt(2 * layers) * float(logits.abs().max())


# --- the checks


def golden_prompts(
    settings: Settings, tokenizer: PreTrainedTokenizerBase
) -> tuple[Check, list[list[int]]]:
    """Hold what the tokenizer and the chat wrap make of a few texts against recorded token ids.

    Returns:
        the check; the ids that were made now, for whoever records a new model's.
    """
    golden = json.loads(_GOLDEN.read_text(encoding="utf-8"))
    made = [golden_ids(tokenizer, text, settings.prompt_format) for text in golden["prompts"]]
    looked_at = f"{len(made)} texts: wrapped, unwrapped, of many scripts, cut in the middle"
    wanted: list[list[int]] | None = golden["ids"].get(settings.model.name)
    if wanted is None:
        found = f"no token ids were recorded for {settings.model.name}"
        return Check("golden prompts", looked_at, Status.NOT_APPLICABLE, found), made
    for number, (ids, recorded) in enumerate(zip(made, wanted, strict=True)):
        if ids != recorded:
            now, before = (str(tokenizer.decode(each)) for each in (ids, recorded))
            if now == before:
                now, before = str(ids), str(recorded)
            found = f"text {number} becomes {now!r} where {before!r} was recorded"
            return Check("golden prompts", looked_at, Status.FAILED, found), made
    return Check("golden prompts", looked_at, Status.PASSED, "the recorded token ids"), made


def golden_ids(
    tokenizer: PreTrainedTokenizerBase, text: Mapping[str, Any], fmt: PromptFormat
) -> list[int]:
    """Return the token ids of one golden text."""
    if text["max_length"] is not None:
        fmt = replace(fmt, max_length=text["max_length"])
    return encode_truncating_middle(tokenizer, text["text"], fmt, wrap=text["wrap"])


class PlainTokens:
    """Whether the engine's full cache chooses the tokens that plain transformers chooses.

    Where the two part, plain transformers' logits of both tokens are compared: as long as these lie
    within rounding of each other it is a tie, which is reported and nothing else. What follows a tie
    or the answer's end is not compared.
    """

    def __init__(self, count: int) -> None:
        """Compare up to `count` tokens an answer."""
        self.count = count
        self.seen = 0
        self.ties: list[str] = []
        self.wrong: list[str] = []

    def see(self, prompt: Prompt, plain: Answer, full: Answer, allowed: float) -> None:
        """Look at one prompt; logits that differ by `allowed` are the same."""
        self.seen += 1
        for number, (theirs, ours) in enumerate(zip(plain.tokens, full.tokens, strict=True)):
            if theirs != ours:
                margin = float(plain.logits[number, theirs] - plain.logits[number, ours])
                which = "the first token" if number == 0 else f"token {number + 1}"
                text = f"{which} of {prompt.name} differs by a logit of {margin:.2g}"
                (self.ties if margin <= allowed else self.wrong).append(text)
            if theirs != ours or theirs in prompt.stop_ids:
                return

    def check(self) -> Check:
        """Return the verdict."""
        looked_at = f"the first {self.count} tokens of {self.seen} prompts, greedy"
        if self.wrong:
            found = f"{_some(self.wrong)}, more than rounding"
            return Check("plain generate", looked_at, Status.FAILED, found)
        tied = f"; a tie within rounding: {_some(self.ties)}" if self.ties else ""
        return Check("plain generate", looked_at, Status.PASSED, f"the same tokens{tied}")


class Budgets:
    """Whether every cell keeps as many entries of each layer and KV head as its budget allows."""

    def __init__(self, model: PreTrainedModel, policy: Policy) -> None:
        """Judge cells of a model under a policy."""
        self.windows = local_windows(model.config)
        self.policy = policy
        self.judged: set[str] = set()
        self.free: set[str] = set()
        """Cells whose number of entries is a threshold's or the authors' rounding's, no budget's."""
        self.prompts: set[str] = set()
        self.wrong: dict[str, str] = {}

    def see(self, prompt: Prompt, cell: Cell, stats: RowStats) -> None:
        """Look at what one cell kept of one prompt."""
        self.prompts.add(prompt.name)
        if not cell.method.meets_budget:
            self.free.add(cell.name)
            return
        self.judged.add(cell.name)
        wanted = self.allowed(cell, prompt.length)
        found = stats.entries
        if cell.method.allocates:
            means = [sum(of_layer) / len(of_layer) for of_layer in found]
            if sum(means) != sum(wanted.values()):
                self.wrong.setdefault(
                    cell.name,
                    f"{cell.name} keeps {sum(means):g} entries over all layers of {prompt.name}, where "
                    f"{sum(wanted.values())} are its budget",
                )
            return
        for of_layer, (layer, count) in zip(found, wanted.items(), strict=True):
            if cell.method.allocates_heads:
                if sum(of_layer) != count * len(of_layer):
                    self.wrong.setdefault(
                        cell.name,
                        f"{cell.name} keeps {sum(of_layer)} entries in layer {layer} of {prompt.name}, "
                        f"where {count} a KV head are its budget",
                    )
                continue
            for head, kept in enumerate(of_layer):
                if kept != count:
                    self.wrong.setdefault(
                        cell.name,
                        f"{cell.name} keeps {kept} entries in layer {layer}, KV head {head} of "
                        f"{prompt.name}, where {count} are its budget",
                    )

    def allowed(self, cell: Cell, length: int) -> dict[int, int]:
        """Return the entries per KV head that a cell may keep, by layer that a budget counts."""
        local = frozenset(i for i, window in enumerate(self.windows) if window is not None)
        counted = [i for i in range(len(self.windows)) if i not in local]
        if cell.method.simulates:
            return dict.fromkeys(counted, length)
        share = (cell.budget, length)
        return {i: self.policy.allowance(*share, i, len(self.windows), local)[0] for i in counted}

    def check(self) -> Check:
        """Return the verdict."""
        looked_at = f"{len(self.judged)} cells, every layer and KV head of {len(self.prompts)} prompts"
        if self.wrong:
            return Check("budgets", looked_at, Status.FAILED, _some(list(self.wrong.values())))
        free = (
            f"; {', '.join(sorted(self.free))} keep what a threshold or rounding gives"
            if self.free
            else ""
        )
        return Check("budgets", looked_at, Status.PASSED, f"met to the entry{free}")


class Compression:
    """Whether compressed cells leave the first token alone and change what comes after it."""

    def __init__(self) -> None:
        """Begin with no prompt seen."""
        self.moved: dict[str, float] = {}
        """By cell, the largest change of a logit, in units of what rounding allows."""
        self.prompts: set[str] = set()
        self.wrong: dict[str, str] = {}

    def see(self, prompt: Prompt, cell: Cell, full: Answer, own: Answer, allowed: float) -> None:
        """Look at one cell's answer beside the full cache's."""
        if cell.budget.entries(prompt.length) >= prompt.length:
            return
        self.prompts.add(prompt.name)
        if own.tokens[0] != full.tokens[0] and not cell.method.alters_prefill:
            self.wrong.setdefault(
                cell.name,
                f"the first token of {cell.name} is not the full cache's on {prompt.name}, though "
                "it is decided before anything is compressed",
            )
        change = float((own.logits[1:] - full.logits[1:]).abs().max()) / allowed
        self.moved[cell.name] = max(self.moved.get(cell.name, 0.0), change)

    def check(self) -> Check:
        """Return the verdict."""
        looked_at = f"{len(self.moved)} cells beside the full cache on {len(self.prompts)} prompts"
        idle = [
            f"{cell} changes nothing: its logits are the full cache's on every prompt"
            for cell, change in self.moved.items()
            if change <= 1
        ]
        if self.wrong or idle:
            found = _some([*self.wrong.values(), *idle])
            return Check("compression", looked_at, Status.FAILED, found)
        if not self.moved:
            found = "no cell's budget is below a prompt's length"
            return Check("compression", looked_at, Status.NOT_APPLICABLE, found)
        found = "the same first token, other logits after it"
        return Check("compression", looked_at, Status.PASSED, found)


def full_budgets(
    model: PreTrainedModel, settings: Settings, prompts: Iterable[Prompt], count: int
) -> Check:
    """Hold every method at a budget of 1 against the full cache, bit for bit.

    Each runs alone, so that nothing differs but the method. A method that decides again after each step
    attends in another way, and may hide something as soon as the answer outgrows the budget: of it two
    tokens are compared, up to rounding.
    """
    full = next(cell for cell in settings.cells if cell.is_full)
    methods = {cell.name.rpartition("@")[0]: cell for cell in settings.cells if not cell.is_full}
    prompts = list(prompts)
    wrong: dict[str, str] = {}
    for prompt in prompts:
        row = settings.row(full, settings.seed)
        (whole,) = engine_answers(model, [row], prompt, count, settings.policy)
        for name, cell in methods.items():
            row = Row(cell.method, Budget.parse(1), settings.seed)
            (own,) = engine_answers(model, [row], prompt, count, settings.policy, whole.tokens)
            steps = settings.policy.decides(cell.method)
            same = 2 if steps else count
            allowed = rounding(settings, model, whole.logits) if steps else 0.0
            change = float((own.logits[:same] - whole.logits[:same]).abs().max())
            differ = own.tokens[:same] != whole.tokens[:same] and not steps
            if differ or not change <= allowed:  # a change may be NaN
                text = f"{name} at a budget of 1 is not the full cache on {prompt.name}"
                wrong.setdefault(name, text)
    looked_at = f"{len(methods)} methods at a budget of 1 on {len(prompts)} prompts"
    if wrong:
        return Check("full budgets", looked_at, Status.FAILED, _some(list(wrong.values())))
    if not methods:
        found = "there is no method but the full cache"
        return Check("full budgets", looked_at, Status.NOT_APPLICABLE, found)
    return Check("full budgets", looked_at, Status.PASSED, "tokens and logits equal, bit for bit")


def unproven(settings: Settings, error: UnprovenError) -> Check:
    """Sum up what ended the checks, since nothing can be said of a cell that reads another cache."""
    looked_at = f"what attention reads for {len(settings.cells)} cells, every step, layer and KV head"
    return Check("no silent no-op", looked_at, Status.FAILED, str(error).removesuffix("."))


def published_scores(found: Sequence[Gate]) -> Check:
    """Sum up the gates of a run's first samples (`harness.report.gates.sampled_gates`)."""
    by = {verdict: [gate for gate in found if gate.verdict is verdict] for verdict in Verdict}
    looked_at = f"the full cache on {', '.join(gate.task for gate in found)}"
    of_reason: dict[str, list[str]] = {}
    for gate in by[Verdict.NOT_COMPARABLE]:
        of_reason.setdefault(gate.reason, []).append(gate.task)
    unclear = "; ".join(f"{reason}: {', '.join(tasks)}" for reason, tasks in of_reason.items())
    if off := by[Verdict.OUTSIDE]:
        text = _some([f"{gate.text} is excluded {gate.reason}" for gate in off])
        return Check("published scores", looked_at, Status.FAILED, text)
    if within := by[Verdict.INSIDE]:
        text = "; ".join(f"{gate.text} is possible {gate.reason}" for gate in within)
        text += f"; not comparable: {unclear}" if unclear else ""
        return Check("published scores", looked_at, Status.PASSED, text)
    return Check("published scores", looked_at, Status.NOT_APPLICABLE, f"not comparable, {unclear}")


def _some(texts: Sequence[str], most: int = 3) -> str:
    more = f"; and {len(texts) - most} more" if len(texts) > most else ""
    return "; ".join(texts[:most]) + more
