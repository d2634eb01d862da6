from __future__ import annotations

import pytest

from harness.report.names import (
    benchmark_label,
    budget_groups,
    budget_label,
    cell_label,
    method_label,
    model_label,
)
from kvmerge.budget import Budget
from kvmerge.places import choices


@pytest.mark.parametrize(
    ("variant", "label"),
    [
        ("kvmerger", "KVMerger"),
        ("h2o", "H2O"),
        ("cam_hh", "CaM (hh)"),
        ("kvmerger:top=0.1", "KVMerger (top=0.1)"),
        ("kvmerger_sized:sigma=inf,top=0.1", "KVMerger (sized, sigma=inf, top=0.1)"),
        ("mine", "mine"),
        ("mine:a=1", "mine (a=1)"),
    ],
)
def test_a_method_is_printed_as_people_write_it(variant: str, label: str) -> None:
    assert method_label(variant) == label


def test_every_method_of_the_project_has_a_printed_name_of_its_own() -> None:
    labels = [method_label(name) for name in choices("method")]
    assert not {name for name, label in zip(choices("method"), labels, strict=True) if name == label}
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize(
    ("budget", "label"),
    [
        (0.35, "35%"),
        (0.29, "29%"),
        (0.125, "12.5%"),
        (1, "100%"),
        (2, "2 entries"),
        (1024, "1,024 entries"),
    ],
)
def test_a_budget_is_a_percentage_or_a_number_of_entries(budget: float, label: str) -> None:
    assert budget_label(Budget.parse(budget)) == label


def test_a_cell_is_its_method_and_its_budget_and_the_full_cache_has_none() -> None:
    assert cell_label("kvmerger:top=0.1@0.35") == "KVMerger (top=0.1) 35%"
    assert cell_label("full@1") == "Full cache"
    assert cell_label("kvmerger:pivot=score") == "KVMerger (pivot=score)"  # of a published number


def test_cells_of_one_budget_stand_together_wherever_they_were_listed() -> None:
    cells = ("h2o@0.5", "full@1", "h2o@0.35", "cam@0.5", "h2o@1")
    assert budget_groups(cells) == {
        "50%": ["h2o@0.5", "cam@0.5"],
        "Full cache": ["full@1"],
        "35%": ["h2o@0.35"],
        "100%": ["h2o@1"],
    }


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("smollm2-135m", "SmolLM2-135M"),
        ("llama2-7b-chat", "Llama-2-7B-Chat"),
        ("qwen2.5-7b-instruct", "Qwen2.5-7B-Instruct"),
        ("org/My Model", "org/My Model"),
    ],
)
def test_a_model_is_written_as_its_authors_do(name: str, label: str) -> None:
    assert model_label(name) == label


def test_a_benchmark_that_is_not_known_keeps_its_name() -> None:
    assert benchmark_label("zero_scrolls") == "ZeroSCROLLS"
    assert benchmark_label("my rows") == "my rows"
