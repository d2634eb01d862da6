"""What came of trying a method on the rules."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Iterator
from dataclasses import dataclass

from kvmerge.check.rules import RULES, Broken, Rule
from kvmerge.errors import NotFinite, UserError
from kvmerge.method import Method
from kvmerge.proof import UnprovenError


@dataclass(frozen=True)
class Outcome:
    """One rule on one method."""

    rule: Rule
    fault: str = ""
    """What was expected and what came; empty where the rule holds."""
    excuse: str = ""
    """Why the rule is not for this method; empty where it was tried."""
    notes: tuple[str, ...] = ()
    """What was noticed that is allowed."""


def outcomes(method: Method) -> Iterator[Outcome]:
    """Try a method on each rule in turn."""
    for rule in RULES:
        excuse = rule.excuse(method)
        yield Outcome(rule, excuse=excuse) if excuse else _tried(rule, method)


def _tried(rule: Rule, method: Method) -> Outcome:
    notes: list[str] = []
    for kv_heads in rule.kv_heads:
        try:
            notes += rule.check(method, kv_heads) or ()
        except Exception as error:
            return Outcome(rule, fault=f"with {kv_heads} KV heads: {_fault(error, method)}")
    return Outcome(rule, notes=tuple(dict.fromkeys(notes)))


def _fault(error: Exception, method: Method) -> str:
    """Say what went wrong; of an error of the method's own, where."""
    if isinstance(error, Broken | UnprovenError):
        return str(error)
    if isinstance(error, NotFinite):
        return f"{error.found}; the model's own numbers are finite, so this comes of the method's."
    if isinstance(error, UserError):
        return f"the method refuses what the rule needs ({error}); try it with other settings."
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == inspect.getsourcefile(type(method))]
    last = (own or frames)[-1]
    return f"{type(error).__name__}: {error} ({last.filename}, line {last.lineno})"
