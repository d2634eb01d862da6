"""What the tests of reports share."""

from __future__ import annotations

import pytest

from harness.report.page import assemble
from harness.report.plots.draw import Drawn
from harness.report.plots.style import Plot
from harness.report.words import setting


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put one empty picture with a true caption where drawing is not the point: it takes seconds."""
    monkeypatch.setattr(
        assemble,
        "draw_all",
        lambda run, by_method, judgement: Drawn(
            (Plot("scores_by_task", "Scores by task", setting(run), "Marks.", b"", b""),)
        ),
    )
