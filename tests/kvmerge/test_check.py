"""Faulty methods, each with one fault, and the rule of the contract that must name it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from kvmerge.check import RULES, outcome, outcomes
from kvmerge.check.__main__ import main
from kvmerge.method import Entries, Method, pick, select, top_positions
from tests.own_parts import CONFIGS, MODULES, importable, write


def first(layer, n_keep: int) -> Entries:
    """The first tokens."""
    positions = torch.arange(n_keep).expand(*layer.keys.shape[:2], n_keep)
    return select(layer, positions)


@dataclass(frozen=True)
class Sound(Method):
    """Keep the first tokens, as whatever is faulty below does but for its fault."""

    def compress(self, layer, allowance):
        return first(layer, allowance.n_keep)


@dataclass(frozen=True)
class TooMany(Sound):
    def compress(self, layer, allowance):
        return first(layer, allowance.n_keep + 1)


@dataclass(frozen=True)
class TooFewWhereAllFits(Sound):
    acts_on_decode: ClassVar[bool] = True

    def compress(self, layer, allowance):
        return first(layer, max(1, allowance.n_keep - 1))

    def hold(self, entries, step):
        return entries


@dataclass(frozen=True)
class Unsorted(Sound):
    def compress(self, layer, allowance):
        entries = first(layer, allowance.n_keep)
        return pick(entries, torch.arange(allowance.n_keep).flip(0).expand(*entries.positions.shape))


@dataclass(frozen=True)
class Twice(Sound):
    def compress(self, layer, allowance):
        entries = first(layer, allowance.n_keep)
        return replace(entries, positions=entries.positions // 2)


@dataclass(frozen=True)
class Beyond(Sound):
    def compress(self, layer, allowance):
        entries = first(layer, allowance.n_keep)
        return replace(entries, positions=entries.positions + layer.length)


@dataclass(frozen=True)
class NarrowPositions(Sound):
    def compress(self, layer, allowance):
        entries = first(layer, allowance.n_keep)
        return replace(entries, positions=entries.positions.int())


@dataclass(frozen=True)
class Drawing(Sound):
    def compress(self, layer, allowance):
        return select(layer, top_positions(torch.rand(layer.keys.shape[:3]), allowance.n_keep))


@dataclass(frozen=True)
class Undrawing(Sound):
    stochastic: ClassVar[bool] = True


@dataclass(frozen=True)
class Changing(Sound):
    def compress(self, layer, allowance):
        kept = first(layer, allowance.n_keep)
        layer.values[:, :, -1] += 1
        return kept


@dataclass(frozen=True)
class NotANumber(Sound):
    def compress(self, layer, allowance):
        entries = first(layer, allowance.n_keep)
        return replace(entries, values=entries.values.clone().index_fill(2, torch.tensor(0), torch.nan))


@dataclass(frozen=True)
class Overflowing(Sound):
    def compress(self, layer, allowance):
        entries = first(layer, allowance.n_keep)
        return replace(entries, values=entries.values * 1e6)


@dataclass(frozen=True)
class Widening(Sound):
    def compress(self, layer, allowance):
        entries = first(layer, allowance.n_keep)
        return replace(entries, keys=entries.keys.double())


@dataclass(frozen=True)
class Remembering(Sound):
    seen: ClassVar[list[int]] = []

    def compress(self, layer, allowance):
        self.seen.append(layer.length)
        return select(layer, first(layer, allowance.n_keep).positions + len(set(self.seen)) % 3)


@dataclass(frozen=True)
class Counting(Sound):
    """What it keeps depends on whether another row compressed this layer before."""

    last: ClassVar[dict[str, object]] = {}

    def compress(self, layer, allowance):
        again = self.last.get("keys") is layer.keys
        self.last["keys"] = layer.keys
        return select(layer, first(layer, allowance.n_keep).positions + int(again))


@dataclass(frozen=True)
class Undeclared(Sound):
    def compress(self, layer, allowance):
        scores = layer.keys.norm(dim=-1) if layer.layer_idx else layer.scores + 1
        return select(layer, top_positions(scores, allowance.n_keep))


@dataclass(frozen=True)
class ByHead(Sound):
    """What a KV head keeps depends on its number."""

    def compress(self, layer, allowance):
        heads = torch.arange(layer.keys.shape[1]).view(1, -1, 1)
        room = layer.length - allowance.n_keep
        return select(layer, first(layer, allowance.n_keep).positions + heads.clamp(max=room))


@dataclass(frozen=True)
class Hoarding(Sound):
    holds: ClassVar[bool] = True

    def hold(self, entries, step):
        return entries


@dataclass(frozen=True)
class Dropping(Sound):
    """Evicts under any policy, and says so, but under append too."""

    acts_on_decode: ClassVar[bool] = True

    def hold(self, entries, step):
        n = min(entries.keys.shape[2], step.allowance.n_keep)
        return pick(entries, torch.arange(n).expand(*entries.positions.shape[:2], n))


@dataclass(frozen=True)
class Seeing(Sound):
    """Says that it alters the prefill, and lets every row see all before it."""

    alters_prefill: ClassVar[bool] = True

    def visible(self, layer, allowance):
        length = layer.length
        return (
            torch.ones(length, length, dtype=torch.bool).tril().expand(1, layer.keys.shape[1], -1, -1)
        )


@dataclass(frozen=True)
class Counted(Sound):
    """Decides by how often it was asked while decoding."""

    holds: ClassVar[bool] = True
    asked: ClassVar[list[int]] = []

    def hold(self, entries, step):
        self.asked.append(step.step)
        n = entries.keys.shape[2]
        kept = [slot for slot in range(n) if slot != len(self.asked) * 7 % n]
        if n <= step.allowance.n_keep:
            return entries
        return pick(entries, torch.tensor(kept).expand(*entries.positions.shape[:2], n - 1))


@dataclass
class Changeable(Method):
    window: int = 4

    def compress(self, layer, allowance):
        return first(layer, allowance.n_keep)


class Undecorated(Sound):
    window: int = 4


@dataclass(frozen=True)
class Crashing(Sound):
    def compress(self, layer, allowance):
        return first(layer, [allowance.n_keep][1])


FAULTS: list[tuple[Callable[[], Method], str, str]] = [
    (TooMany, "keeps_its_allowance", "26 entries of the prompt|expected .*25"),
    (TooMany, "little_longer_prompts_are_compressed", "attention reads"),
    (TooFewWhereAllFits, "short_prompts_are_kept", "attention reads 20 entries per KV head"),
    (TooFewWhereAllFits, "a_full_budget_changes_nothing", ""),
    (Unsorted, "positions_ascend", r"ascending positions of layer 0 .* got \[16, 15, 14"),
    (Twice, "positions_ascend", r"ascending positions of layer 0 .* got \[0, 0, 1"),
    (Beyond, "positions_ascend", "from 0 to 49 was expected, got 50 to 66"),
    (NarrowPositions, "positions_ascend", "dtype of positions .* expected torch.int64"),
    (
        Drawing,
        "draws_are_seeded",
        "the same entries again, with the same seed was expected, got others",
    ),
    (Undrawing, "draws_are_seeded", "other entries with another seed, as it is stochastic"),
    (Changing, "layers_are_left_as_they_were", "values of the layer as they were was expected"),
    (NotANumber, "keeps_its_allowance", "finite values, layer 0 .* NaN or infinity"),
    (
        Overflowing,
        "half_precision_is_finite",
        "^with 4 KV heads: Overflowing@0.35: its logits are not finite, so they choose no token; the "
        r"model's own numbers are finite, so this comes of the method's\.$",
    ),
    (
        Widening,
        "keeps_its_allowance",
        "dtype of keys, layer 0 .*expected torch.float32, got torch.float64",
    ),
    (Remembering, "samples_leave_nothing_behind", "the answer after other samples, .*expected"),
    (Counting, "batches_change_nothing", "in a batch, decode_policy=append: expected"),
    (Undeclared, "scores_are_declared", r"TypeError: .*\(.*test_check.py, line \d+\)"),
    (
        ByHead,
        "groups_keep_what_their_heads_would",
        "positions .* of layer 0 at budget 0.5 was expected",
    ),
    (Hoarding, "holds_the_budget", "bytes after 1 steps: expected|entries"),
    (Dropping, "appends_one_entry_a_step", "bytes after the prompt and each token: expected"),
    (
        Seeing,
        "the_first_token_is_the_full_caches",
        "other logits, as the method declares alters_prefill",
    ),
    (Counted, "decodes_as_the_plain_engine", "the answer, decode_policy=hold: expected"),
    (Changeable, "settings_are_frozen", r"@dataclass\(frozen=True\) on Changeable was expected"),
    (Undecorated, "settings_are_frozen", "Undecorated as a dataclass was expected"),
    (Crashing, "little_longer_prompts_are_compressed", r"IndexError: .*test_check.py, line \d+\)"),
]
BY_NAME = {rule.name: rule for rule in RULES}


@pytest.mark.parametrize(
    ("faulty", "name", "why"), FAULTS, ids=[f"{f[0].__name__}-{f[1]}" for f in FAULTS]
)
def test_a_fault_is_named_by_its_rule(
    monkeypatch: pytest.MonkeyPatch, faulty: Callable[[], Method], name: str, why: str
) -> None:
    monkeypatch.setattr(outcome, "RULES", [BY_NAME[name]])
    (found,) = outcomes(faulty())
    assert re.search(why, found.fault), found.fault
    assert found.fault


def test_every_rule_that_a_method_can_break_is_broken_by_a_fault() -> None:
    of_the_engine = {"broken_keys_are_refused"}
    assert {name for _, name, _ in FAULTS} == set(BY_NAME) - of_the_engine


def test_a_sound_method_holds_to_every_rule() -> None:
    found = list(outcomes(Sound()))
    assert [each.rule.name for each in found] == list(BY_NAME)
    assert [each.fault for each in found if each.fault] == []
    assert {each.rule.name: each.excuse for each in found if each.excuse} == {
        "holds_the_budget": "the method has no rule for decode_policy=hold"
    }


# the command


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some rules, as the others take seconds."""
    names = ("settings_are_frozen", "positions_ascend", "scores_are_declared")
    monkeypatch.setattr(outcome, "RULES", [BY_NAME[name] for name in names])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)


def test_a_line_a_rule_is_printed(few: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["h2o", "recent=4"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "H2O(heavy=None, recent=4, score_dtype='float32')",
        "  holds   settings are a frozen dataclass, so no state can leak",
        "  holds   positions ascend within the prompt, none twice",
        "          refuses 3 entries of 50 tokens: recent=4 is more than the budget of 3 of 50 prompt "
        "tokens; raise the budget or lower recent.",
        "  -       attention scores are read only where needs_scores is declared",
        "          it is declared",
        "2 rules hold, 0 are broken, 1 are not for it.",
    ]


def test_a_broken_rule_says_what_was_expected_and_what_came(
    few: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([f"{__name__}.Unsorted"]) == 1
    out = capsys.readouterr().out
    assert "  BROKEN  positions ascend within the prompt, none twice\n" in out
    assert (
        "with 4 KV heads: ascending positions of layer 0 at budget 0.35 was expected, got [16, 15"
        in out
    )
    assert out.endswith("2 rules hold, 1 are broken, 0 are not for it.\n")


def test_a_method_that_refuses_what_a_rule_needs_is_told_so(
    few: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["h2o", "recent=40"]) == 1
    assert "the method refuses what the rule needs (" in capsys.readouterr().out


def test_methods_of_a_folder_are_tried(
    few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(write(tmp_path / "modules", MODULES))
    folder = write(tmp_path / "mine", CONFIGS)
    with importable():
        assert main(["mine_late", "--config-dir", str(folder)]) == 0
    assert capsys.readouterr().out.startswith("Shortest(recent=16)\n")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["kvmergr"], "unknown method 'kvmergr'. Did you mean 'kvmerger'?"),
        (["no_such_package.Method"], "No module named 'no_such_package'"),
        (["h2o", "recnt=3"], "unknown setting of h2o 'recnt'. Did you mean 'recent'?"),
        (["h2o", "recent"], "cannot read 'recent' in the settings of h2o: it has no value."),
        (["h2o", "recent=x"], "recent='x' must be"),
        (
            ["h2o", "-cd", "nowhere"],
            "nowhere, given by --config-dir or KVMERGE_CONFIG_DIR, is not a folder",
        ),
    ],
)
def test_what_cannot_be_tried_is_one_sentence(
    few: None, capsys: pytest.CaptureFixture[str], arguments: list[str], why: str
) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert why in printed.err
    assert printed.out == ""
