from __future__ import annotations

import pytest

from kvmerge.cells import make_cell, parse_cell, parse_cells
from kvmerge.errors import UserError


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("full@1", "full@1"),
        ("full@1.0", "full@1"),
        ("kvmerger@0.350", "kvmerger@0.35"),
        ("h2o@1024", "h2o@1024"),
        ("h2o@1e-3", "h2o@0.001"),
        (" kvmerger : sigma = mean_distance @0.35", "kvmerger:sigma=mean_distance@0.35"),
        ("kvmerger:top=0.1,recent=0.2@0.5", "kvmerger:recent=0.2,top=0.1@0.5"),
        ("kvmerger:sigma=5,epsilon=0.75@0.5", "kvmerger@0.5"),
        ("kvmerger:sigma=5.0,linkage=adjacent@0.5", "kvmerger:linkage=adjacent@0.5"),
        ("kvmerger:recent=null@0.5", "kvmerger@0.5"),
        ("kvmerger_log:attn_bias=none@0.5", "kvmerger_log:attn_bias=none@0.5"),
        ("kvmerger:sigma=1e-05@0.5", "kvmerger:sigma=1e-05@0.5"),
        ("kvmerger:sigma=1e-5@0.5", "kvmerger:sigma=1e-05@0.5"),
        ("kvmerger:sigma=3000000@0.5", "kvmerger:sigma=3e+06@0.5"),
        ("kvmerger:sigma=1.23456789@0.5", "kvmerger:sigma=1.23456789@0.5"),
    ],
)
def test_a_name_says_what_differs_from_the_methods_file_and_reads_back(given: str, name: str) -> None:
    cell = parse_cell(given)
    assert cell.name == name
    again = parse_cell(name)
    assert again == cell
    assert again.method == cell.method


def test_values_are_typed_as_in_a_configuration_file() -> None:
    settings = parse_cell("kvmerger:sigma=3,top=1e-2,pivot=first,recent=null@0.5").settings()
    assert (settings["sigma"], settings["top"], settings["pivot"]) == (3, 0.01, "first")
    assert settings["recent"] is None
    assert type(settings["sigma"]) is int


def test_settings_are_all_of_them_and_reach_the_method() -> None:
    cell = parse_cell("kvmerger:sigma=3@0.5")
    assert cell.method.sigma == 3  # type: ignore[attr-defined]
    assert cell.settings()["epsilon"] == 0.75
    assert cell.settings()["_target_"] == "kvmerge.kvmerger.KVMerger"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (
            "kvmergr@0.5",
            "unknown method 'kvmergr'. Did you mean 'kvmerger'\\?.*Available: .*cam, ",
        ),
        ("kvmerger:sgima=3@0.5", "unknown setting of kvmerger 'sgima'. Did you mean 'sigma'"),
        ("kvmerger:_target_=os.system@0.5", "unknown setting of kvmerger '_target_'"),
        ("h2o:score_dtype=modle@0.5", "unknown score_dtype 'modle'. Did you mean 'model'"),
        ("full@0.5", "full@0.5: the full cache keeps everything"),
        ("full@1024", "full@1024"),
        ("h2o", "cannot read the cell 'h2o'"),
        ("", "cannot read the cell ''"),
        (0.5, "cannot read the cell 0.5"),
        ({"h2o@0.5": 1}, "cannot read the cell"),
        ("@0.5", "unknown method ''"),
        ("h2o@", "budget='' is not a number"),
        ("h2o@half", "budget='half' is not a number"),
        ("h2o@0", "budget=0 is out of range"),
        ("h2o@1.5", "budget=1.5 is out of range"),
        ("h2o@2.0", "budget=2.0 is out of range"),
        ("h2o@nan", "budget=nan is out of range"),
        ("h2o@-3", "budget=-3 is out of range"),
        ("h2o@0.12345678", "more than the six digits"),
        ("h2o@1234567", "more than the six digits"),
        ("h2o@1000000", "more than the six digits"),
        ("kvmerger:sigma@0.5", "cannot read 'sigma' in the cell.*no value"),
        ("kvmerger:sigma=3,sigma=4@0.5", "cannot read 'sigma=4' in the cell.*twice"),
        ("kvmerger:sigma=[@0.5", r"cannot read 'sigma=\['"),
        ("kvmerger:sigma=null@0.5", "sigma=None must be a number or a text"),
        ("kvmerger:sigma=-1@0.5", "sigma=-1 must be"),
    ],
)
def test_what_cannot_be_a_cell_is_refused_and_named(text: object, why: str) -> None:
    with pytest.raises(UserError, match=why):
        parse_cell(text)


@pytest.mark.parametrize("again", ["h2o@0.50", "h2o:heavy=null@0.5", " h2o@.5"])
def test_a_cell_listed_twice_is_refused_however_it_is_written(again: str) -> None:
    with pytest.raises(UserError, match=r"h2o@0\.5 is listed twice"):
        parse_cells(["full@1", "h2o@0.5", again])


def test_alternatives_stand_for_every_cell_in_the_order_of_their_writing() -> None:
    listed = parse_cells(["full@1", "fold:{fold=drop|route=cosine},keep={h2o|tova}@{0.5|0.35}"])
    assert [cell.name for cell in listed] == [
        "full@1",
        *("fold:fold=drop@0.5", "fold:fold=drop@0.35"),
        *("fold:fold=drop,keep=tova@0.5", "fold:fold=drop,keep=tova@0.35"),
        *("fold:route=cosine@0.5", "fold:route=cosine@0.35"),
        *("fold:keep=tova,route=cosine@0.5", "fold:keep=tova,route=cosine@0.35"),
    ]


def test_alternatives_that_meet_are_listed_twice() -> None:
    with pytest.raises(UserError, match=r"h2o@0\.5 is listed twice"):
        parse_cells(["{h2o|snapkv}@0.5", "h2o@{0.5|0.2}"])


@pytest.mark.parametrize("text", ["{h2o@0.5", "h2o}@0.5", "{h2o|{snapkv|tova}}@0.5"])
def test_a_brace_without_its_other_one_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"brace stands alone .* written \{h2o"):
        parse_cells([text])


def test_an_empty_comparison_is_refused() -> None:
    with pytest.raises(UserError, match="lists nothing"):
        parse_cells([])


def test_the_same_method_at_other_budgets_or_settings_is_another_cell() -> None:
    names = ["h2o@0.5", "h2o@0.35", "h2o@64", "h2o:recent=8@0.5"]
    assert [cell.name for cell in parse_cells(names)] == names


def test_only_the_full_cache_is_the_reference() -> None:
    assert parse_cell("full@1").is_full
    assert not parse_cell("h2o@1").is_full


def test_options_equal_to_the_file_are_not_named() -> None:
    assert make_cell("h2o", {"heavy": None}, 0.5).name == "h2o@0.5"
