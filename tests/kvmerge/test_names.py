from __future__ import annotations

import pytest

from kvmerge.budget import Budget
from kvmerge.errors import UserError
from kvmerge.names import CellName, file_name, parse_name


@pytest.mark.parametrize(
    ("text", "method", "options", "budget"),
    [
        ("full@1", "full", "", 1.0),
        ("h2o@1024", "h2o", "", 1024),
        ("kvmerger:sigma=3,top=0.1@0.35", "kvmerger", "sigma=3,top=0.1", 0.35),
        (" kvmerger : sigma = 3 @0.35", "kvmerger", " sigma = 3 ", 0.35),
        ("kvmerger:@0.35", "kvmerger", "", 0.35),
        ("kvmerger:thresholds=a:b/c@d.json@0.35", "kvmerger", "thresholds=a:b/c@d.json", 0.35),
        ("no_such_method:x@0.35", "no_such_method", "x", 0.35),
    ],
)
def test_a_name_comes_apart_whether_or_not_there_is_such_a_method(
    text: str, method: str, options: str, budget: float
) -> None:
    assert parse_name(text) == CellName(method, options, Budget.parse(budget))


@pytest.mark.parametrize("text", ["full@1", "h2o@1024", "h2o@0.001", "kvmerger:sigma=3,top=0.1@0.35"])
def test_a_name_that_was_taken_apart_reads_as_it_was(text: str) -> None:
    assert str(parse_name(text)) == text


def test_a_variant_is_the_method_with_its_options() -> None:
    assert parse_name("kvmerger@0.5").variant == "kvmerger"
    assert parse_name("kvmerger:sigma=3,top=0.1@0.5").variant == "kvmerger:sigma=3,top=0.1"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("h2o", r"cannot read the cell 'h2o'. A cell is <method>\[:option"),
        ("", "cannot read the cell ''"),
        (None, "cannot read the cell None"),
        (0.5, "cannot read the cell 0.5"),
        ([0.5], r"cannot read the cell \[0.5\]"),
        ("h2o@", "budget='' is not a number"),
        ("h2o@half", "budget='half' is not a number"),
        ("h2o@0", "budget=0 is out of range"),
        ("h2o@1.5", "budget=1.5 is out of range"),
    ],
)
def test_what_is_no_name_of_a_cell_is_refused(text: object, why: str) -> None:
    with pytest.raises(UserError, match=why):
        parse_name(text)


def test_a_files_name_has_no_mark_that_a_file_system_minds() -> None:
    assert file_name("kvmerger:top=0.1,thresholds=a/b@0.5") == "kvmerger-top=0.1-thresholds=a-b@0.5"
