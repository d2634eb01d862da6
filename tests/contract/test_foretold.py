"""What a method refuses is refused before there is a model: `Method.check` foretells `compress`."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from kvmerge.budget import Budget
from kvmerge.engine import Stop, run_sample
from kvmerge.errors import UserError
from kvmerge.places import choices
from kvmerge.resolve import load_method
from kvmerge.session import Policy, Row
from tests.tiny import LAYERS, prompt, shared_model

METHODS = choices("method")
NARROW: list[tuple[str, dict[str, object]]] = [
    *((name, {}) for name in METHODS),
    *(("h2o", {"heavy": heavy, "recent": recent}) for heavy, recent in ((3, 4), (None, 9), (9, None))),
    ("h2o_sim_decode", {"heavy": 3, "recent": 4}),
    ("h2o_sim_prefill", {"recent": 9}),
    ("cam", {"start": 5}),
    ("cam_hh", {"bug_compat": True}),
    ("cam_generate", {"start": 5}),
    ("kvmerger", {"budget_mode": "eps_evict", "recent": 0.4, "top": 0.4}),
    ("fold", {"keep": "kvmerger"}),
]
"""Methods, some with settings that not every budget fits."""


@pytest.mark.parametrize(
    ("name", "settings"), NARROW, ids=[f"{name}-{i}" for i, (name, _) in enumerate(NARROW)]
)
def test_what_a_method_refuses_is_foretold_in_the_same_words(
    name: str, settings: dict[str, object]
) -> None:
    model, policy, method = shared_model(), Policy(), load_method(name, settings)
    for length, given in itertools.product((1, 2, 3, 12), (1, 0.5, 0.2, 0.05, 2, 5, 7, 1000)):
        row = Row(method, Budget.parse(1 if name == "full" else given))

        def foretell(row: Row = row, length: int = length) -> object:
            return policy.check_prompt(row.method, row.budget, length, [None] * LAYERS)

        def run(row: Row = row, length: int = length) -> object:
            return run_sample(model, prompt(length), [row], Stop(1, frozenset()))

        assert told(foretell) == told(run), (length, given)


def told(act: Callable[[], object]) -> str | None:
    """What `act` is refused with; None where it is not."""
    try:
        act()
    except UserError as error:
        return str(error)
    return None
