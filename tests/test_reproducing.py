"""The commands of docs/reproducing.md are ones that the program takes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from harness.report.published import Source
from kvmerge.budget import recent_share, top_share
from kvmerge.resolve import load_method
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


CLAIMED = re.findall(
    r"^\| `(\w+)` \| (any|[\d.]+) \| ([^|]+) \| (\w+) \| (the same|another)\b", TEXT, re.MULTILINE
)
"""Setting, budget, what the paper is said to use, by whom, and whether it is the default here."""


@pytest.mark.parametrize(
    ("setting", "budget", "claim", "source", "here"), CLAIMED, ids=lambda text: str(text)
)
def test_a_claimed_setting_is_the_default_or_said_not_to_be(
    setting: str, budget: str, claim: str, source: str, here: str
) -> None:
    assert source in list(Source)
    shares = {"recent": recent_share, "top": top_share}
    if setting in shares:
        assert getattr(load_method("kvmerger"), setting) is None, "or the shares are not these"
        ours: object = shares[setting](float(budget))
    elif setting == "layers_skip":
        ours = list(compose("experiment=paper_longbench").policy.layers_skip)
    else:
        ours = getattr(load_method("kvmerger"), setting)
    wanted = claim if setting == "value_scale" else json.loads(claim)
    assert (ours == pytest.approx(wanted) if isinstance(wanted, float) else ours == wanted) is (
        here == "the same"
    )


def test_every_setting_that_is_known_stands_there() -> None:
    assert {(setting, budget, claim) for setting, budget, claim, *_ in CLAIMED} == {
        ("epsilon", "any", "0.75"),
        ("recent", "0.5", "0.17"),
        ("recent", "0.35", "0.08"),
        ("top", "0.5", "0.12"),
        ("top", "0.35", "0.02"),
        ("sigma", "any", "5"),
        ("value_scale", "any", "none"),
        ("layers_skip", "any", "[0, 1, -1]"),
    }


def test_every_kind_of_source_is_explained() -> None:
    told = re.findall(r"^\| `(\w+)` \| in [^|]+ \| (yes|no) \|$", TEXT, re.MULTILINE)
    assert told == [(str(kind), "no" if kind.is_quoted else "yes") for kind in Source]
