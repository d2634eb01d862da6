from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from baselines.h2o import H2O
from benchmarks.mini.benchmark import Mini
from harness import code

FILES = {
    "mine/__init__.py": "",
    "mine/method.py": "from mine import helper\nfrom .deep.inner import thing\nimport json\n",
    "mine/helper.py": "def late():\n    from mine import far\n",
    "mine/far.py": "",
    "mine/deep/__init__.py": "",
    "mine/deep/inner.py": "from .. import sibling\nthing = sibling.x\n",
    "mine/sibling.py": "x = 1\n",
    "mine/types_only.py": "",
    "mine/unused.py": "",
    "mine/prompt.txt": "Read.",
}
TYPED = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from mine import types_only\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    path = tmp_path / "mine/method.py"
    path.write_text(path.read_text() + TYPED)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "mine"]:
        del sys.modules[name]


def fresh() -> dict[str, str]:
    """The digests, with nothing remembered of files that a test has changed."""
    for each in vars(code).values():
        if isinstance(each, functools._lru_cache_wrapper):
            each.cache_clear()
    return code.digests(["mine.method"])


def test_what_a_module_imports_is_followed_and_types_and_others_are_not(folder: Path) -> None:
    modules = {name for name in fresh() if not name.endswith(" data")}
    followed = {"helper", "far", "deep", "deep.inner", "sibling", "method"}
    assert modules == {"mine"} | {f"mine.{name}" for name in followed}


@pytest.mark.parametrize("name", [name for name in FILES if "types_only" not in name])
def test_a_change_is_seen_in_its_own_file_alone(folder: Path, name: str) -> None:
    before = fresh()
    path = folder / name
    path.write_text(path.read_text() + "\n# changed\n")
    after = fresh()
    changed = [module for module in before if before[module] != after[module]]
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    expected = {"mine/unused.py": [], "mine/prompt.txt": ["mine data"]}.get(name, [module])
    assert changed == expected


def test_a_module_without_a_file_is_said_to_be_unknown() -> None:
    assert code.digests(["no_such_module"]) == {"no_such_module": "unknown"}


def test_a_method_is_its_own_modules_without_those_of_others() -> None:
    shared = code.digests(["kvmerge.engine"])
    assert "kvmerge.session" in shared
    own = code.digests(code.homes(H2O()), without=shared)
    assert {"baselines.h2o", "baselines.heavy_hitters"} <= set(own)
    assert not {"baselines.cam", "kvmerge.kvmerger", "kvmerge.session"} & set(own)


def test_a_benchmark_has_its_prompts() -> None:
    assert {"benchmarks.mini.tasks", "benchmarks.mini data"} <= set(code.digests(code.homes(Mini())))


@dataclass(frozen=True)
class Around:
    """A method that holds another one."""

    inner: H2O = field(default_factory=H2O)


def test_a_method_inside_another_is_part_of_it() -> None:
    assert code.homes(Around()) == {__name__, "baselines.h2o"}


def test_what_lies_beside_a_users_method_is_followed_and_what_is_installed_is_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = folder / "lib" / "site-packages"
    for path, text in {
        folder / "lone.py": "import near, grouped.part, far_off\nfrom kvmerge import method\n",
        folder / "near.py": "import harness.cli\n",
        folder / "grouped" / "part.py": "",
        site / "far_off.py": "import near_far\n",
        site / "near_far.py": "",
        site / "packed" / "__init__.py": "import near_far, packed.inner, near\n",
        site / "packed" / "inner.py": "",
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(site)
    fresh()
    own = code.digests(["lone"])
    assert {"lone", "near", "grouped", "grouped.part", "kvmerge.method"} <= set(own)
    assert not {"far_off", "near_far", "harness", "harness.cli", "mine"} & set(own)
    assert {"packed", "packed.inner"} == set(code.digests(["packed"]))


def test_the_projects_own_modules_lead_to_none_of_its_tools_or_tests() -> None:
    found = code.digests(["kvmerge.engine", "harness.answering", "benchmarks.mini.benchmark"])
    assert {name.partition(".")[0] for name in found} <= {*code.OURS, "harness"}
    assert {name for name in found if name.startswith("harness")} == {"harness", "harness.answering"}
