"""Cells: what a comparison is made of, a method with its settings at a budget.

A cell is written `<method>[:option=value,...]@<budget>`, e.g. `kvmerger:sigma=mean_distance@0.35`; the
same name stands in configurations, results files and tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml
from omegaconf import OmegaConf

from kvmerge.budget import Budget
from kvmerge.errors import UserError
from kvmerge.method import Method
from kvmerge.resolve import load_method, method_settings


@dataclass(frozen=True)
class Cell:
    """One method at one budget. Build it with `make_cell` or `parse_cell`."""

    method_name: str
    options: tuple[tuple[str, Any], ...]
    """Settings that differ from the method's file, sorted by name."""
    budget: Budget
    method: Method = field(compare=False, repr=False)

    @property
    def name(self) -> str:
        """The cell's name in results."""
        options = ",".join(f"{key}={_text(value)}" for key, value in self.options)
        return f"{self.method_name}{':' + options if options else ''}@{self.budget}"

    @property
    def is_full(self) -> bool:
        """Whether the cell is the reference: the full cache."""
        return self.method_name == "full"

    def settings(self) -> dict[str, Any]:
        """All settings, for provenance and safe resuming."""
        return method_settings(self.method_name) | dict(self.options)


def make_cell(method_name: str, options: Mapping[str, Any], budget: object) -> Cell:
    """Validate a cell. Raises `UserError` naming what cannot be used."""
    defaults = method_settings(method_name)
    method = load_method(method_name, options)
    changed = {key: value for key, value in options.items() if value != defaults.get(key)}
    parsed = Budget.parse(budget)
    if float(str(parsed)) != parsed.value or "e+" in str(parsed):
        raise UserError(f"budget={budget} has more than the six digits that results are named by.")
    if method_name == "full" and parsed != Budget.parse(1):
        raise UserError(
            f"full@{parsed}: the full cache keeps everything, its budget is 1. "
            "To keep part of the cache choose a method that compresses."
        )
    return Cell(method_name, tuple(sorted(changed.items())), parsed, method)


def parse_cell(text: object) -> Cell:
    """Read a cell's name. Raises `UserError` naming what cannot be used."""
    form = "A cell is <method>[:option=value,...]@<budget>, e.g. kvmerger@0.35."
    if not isinstance(text, str) or "@" not in text:
        raise UserError(f"cannot read the cell {text!r}. {form}")
    variant, _, budget = text.rpartition("@")
    method_name, _, listed = variant.partition(":")
    options: dict[str, Any] = {}
    for part in filter(None, listed.split(",")):
        key, separator, value = part.partition("=")
        key = key.strip()
        if not separator or key in options:
            why = "it is given twice" if separator else "it has no value"
            raise UserError(f"cannot read {part!r} in the cell {text!r}: {why}. {form}")
        try:
            # typed as Hydra types a value: unlike plain YAML, 1e-5 is a number
            options[key] = OmegaConf.from_dotlist([f"value={value}"]).value
        except yaml.YAMLError:
            raise UserError(f"cannot read {part!r} in the cell {text!r}. {form}") from None
    return make_cell(method_name.strip(), options, budget)


def parse_cells(texts: Iterable[object]) -> list[Cell]:
    """Read the cells of a comparison, refusing one that is listed twice."""
    cells: list[Cell] = []
    for text in texts:
        cell = parse_cell(text)
        if cell.name in {other.name for other in cells}:
            raise UserError(f"the cell {cell.name} is listed twice.")
        cells.append(cell)
    if not cells:
        raise UserError("cells=[] lists nothing to run, e.g. cells=[full@1,kvmerger@0.35].")
    return cells


def _text(value: Any) -> str:
    """Write a value so that `parse_cell` reads the same one."""
    if isinstance(value, bool) or value is None:
        return str(value).lower() if value is not None else "null"
    if not isinstance(value, int | float):
        return str(value)
    short = f"{value:g}"
    return short if float(short) == value else repr(value)
