"""The names of cells, taken apart without knowing whether there are such methods.

A cell is written `<method>[:option=value,...]@<budget>`, e.g. `kvmerger:sigma=mean_distance@0.35`; the
same name stands in configurations, results files and tables. A list of cells may be shortened by
alternatives: `{h2o|kvmerger}@{0.5|0.35}` lists four.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from operator import add

from kvmerge.budget import Budget
from kvmerge.errors import UserError

FORM = "A cell is <method>[:option=value,...]@<budget>, e.g. kvmerger@0.35."
"""How a name is written, for messages."""
_ALTERNATIVES = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class CellName:
    """A cell's name taken apart, without knowing whether there is such a method."""

    method: str
    options: str
    """As they are written, `option=value,...`; empty where there are none."""
    budget: Budget

    @property
    def variant(self) -> str:
        """The method with its options: what stands before the `@`."""
        return f"{self.method}:{self.options}" if self.options else self.method

    def __str__(self) -> str:
        return f"{self.variant}@{self.budget}"


def parse_name(text: object) -> CellName:
    """Take a cell's name apart. Raises `UserError` for what has another form, or a bad budget."""
    if not isinstance(text, str) or "@" not in text:
        raise UserError(f"cannot read the cell {text!r}. {FORM}")
    return _parsed(text)


@lru_cache(maxsize=1024)
def _parsed(text: str) -> CellName:
    variant, _, budget = text.rpartition("@")
    method, _, options = variant.partition(":")
    return CellName(method.strip(), options, Budget.parse(budget))


def file_name(cell_name: str) -> str:
    """Return a cell's name as files and folders have it: `:`, `,` and `/` of its options become `-`."""
    return cell_name.translate(str.maketrans(":,/", "---"))


def spelled_out(text: str) -> list[str]:
    """Return every text that alternatives stand for: `{a|b}@{1|2}` for `a@1`, `a@2`, `b@1` and `b@2`.

    Raises:
        UserError: for a brace without its other one, or inside another pair.
    """
    parts = _ALTERNATIVES.split(text)
    fixed, varied = parts[::2], [part.split("|") for part in parts[1::2]]
    if any(brace in part for part in fixed for brace in "{}"):
        raise UserError(
            f"cannot read the cells {text!r}: a brace stands alone or inside others. Alternatives are "
            "written {h2o|kvmerger}@{0.5|0.35}."
        )
    return [
        fixed[0] + "".join(map(add, chosen, fixed[1:]))  # in turn what varies, and what is fixed
        for chosen in product(*varied)
    ]
