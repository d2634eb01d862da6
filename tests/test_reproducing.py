"""The commands of docs/reproducing.md are ones that the program takes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.tiny_run import compose

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "reproducing.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^ *(?:CUDA_VISIBLE_DEVICES=\$k )?python run\.py ([^#&\n]*)", TEXT, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_shown_run_composes(command: str) -> None:
    settings = compose(*command.replace("$k", "0").split())
    assert settings.cells[0].is_full
    assert settings.model.name == "llama2-7b-chat"
    if settings.num_shards == 1:
        assert settings.output_dir.parts[:2] == ("results", "runs")


def test_there_are_such_commands() -> None:
    assert len(COMMANDS) == 7


def test_output_dirs_that_are_named_are_those_of_the_runs() -> None:
    named = set(re.findall(r"results/runs/[\w/.-]+", TEXT))
    made = {str(compose(*command.replace("$k", "0").split()).output_dir) for command in COMMANDS}
    assert named <= made


def test_paths_that_are_named_exist() -> None:
    named = re.findall(r"`?((?:results/reference|scripts|configs|docs)/[\w./-]*\w)", TEXT)
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []
