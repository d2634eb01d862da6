from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.longbench.tasks import TASKS
from scripts import grid

PAGE = (Path(__file__).parents[2] / "docs" / "cost.md").read_text(encoding="utf-8")


def test_the_page_shows_what_the_command_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "MODELS", ("mistral-7b-instruct-v0.1",))
    monkeypatch.setattr(grid, "BENCHMARKS", {"zero_scrolls": "paper_zeroscrolls"})
    for line in grid.table("h100"):
        assert line in PAGE.splitlines()


def test_prompts_are_cut_as_the_models_are() -> None:
    run = grid.settings(["experiment=paper_longbench", "model=llama2-7b-chat"])
    found = {task.name: of for task, of in grid.tokens(run).items()}
    assert set(found) < {task.name for task in TASKS}
    assert found["multi_news"].mean == round(1.4 * 2113)
    assert found["narrativeqa"].mean == 3500
    assert sum(of.jobs for of in found.values()) == 1750
    assert found["trec"].answers == 200 * 11  # seven cells, CaM's with three seeds
