"""Cells: what a comparison is made of, a method with its settings at a budget.

`kvmerge.names` says how they are written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import yaml
from omegaconf import OmegaConf

from kvmerge.budget import Budget
from kvmerge.errors import UserError
from kvmerge.files import check_name
from kvmerge.method import Method
from kvmerge.names import FORM, CellName, file_name, parse_name, spelled_out
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
        return str(CellName(self.method_name, options, self.budget))

    @property
    def is_full(self) -> bool:
        """Whether the cell is the reference: the full cache."""
        return self.method_name == "full"

    def settings(self) -> dict[str, Any]:
        """Return all settings, those of methods that this one is made of too, for safe resuming."""
        parts = {
            each.name: asdict(part)  # type: ignore[call-overload]
            for each in fields(self.method)  # type: ignore[arg-type]
            if isinstance(part := getattr(self.method, each.name), Method)
        }
        return method_settings(self.method_name) | dict(self.options) | parts


def make_cell(method_name: str, options: Mapping[str, Any], budget: object) -> Cell:
    """Validate a cell. Raises `UserError` naming what cannot be used."""
    defaults = method_settings(method_name)
    method = load_method(method_name, options)
    changed = {key: value for key, value in options.items() if value != defaults.get(key)}
    parsed = budget if isinstance(budget, Budget) else Budget.parse(budget)
    if float(str(parsed)) != parsed.value or "e+" in str(parsed):
        raise UserError(f"budget={budget} has more than the six digits that results are named by.")
    if method_name == "full" and parsed != Budget.parse(1):
        raise UserError(
            f"full@{parsed}: the full cache keeps everything, its budget is 1. "
            "To keep part of the cache choose a method that compresses."
        )
    cell = Cell(method_name, tuple(sorted(changed.items())), parsed, method)
    check_name("cell", file_name(cell.name))
    return cell


def parse_cell(text: object) -> Cell:
    """Build the cell of a name. Raises `UserError` naming what cannot be used."""
    name = parse_name(text)
    options = read_options(filter(None, name.options.split(",")), f"the cell {text!r}", FORM)
    return make_cell(name.method, options, name.budget)


def read_options(parts: Iterable[str], of: str, form: str = "") -> dict[str, Any]:
    """Read options, each `option=value`, typed as Hydra types a value.

    Args:
        parts: the options as they are written.
        of: where they stand, for messages.
        form: how they are written, for messages.

    Raises:
        UserError: naming an option that has no value, is given twice, or cannot be read.
    """
    options: dict[str, Any] = {}
    for part in parts:
        key, separator, value = part.partition("=")
        key = key.strip()
        if not separator or key in options:
            why = "it is given twice" if separator else "it has no value"
            raise UserError(f"cannot read {part!r} in {of}: {why}. {form}".rstrip())
        try:
            # unlike plain YAML, 1e-5 is a number
            options[key] = OmegaConf.from_dotlist([f"value={value}"]).value
        except yaml.YAMLError:
            raise UserError(f"cannot read {part!r} in {of}. {form}".rstrip()) from None
    return options


def parse_cells(texts: Iterable[object]) -> list[Cell]:
    """Read the cells of a comparison, alternatives among them, refusing one that is listed twice."""
    cells: list[Cell] = []
    known: set[str] = set()
    for text in texts:
        for each in spelled_out(text) if isinstance(text, str) else [text]:
            cell = parse_cell(each)
            if cell.name in known:
                raise UserError(f"the cell {cell.name} is listed twice.")
            known.add(cell.name)
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
