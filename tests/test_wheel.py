"""What an installed wheel holds, and that it runs far from any checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.own_parts import CONFIGS, MODULES, install, write

ROOT = Path(__file__).parent.parent
PARTS = ("kvmerge", "baselines", "benchmarks", "harness", "configs", "results/reference")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the unpacked wheel, built from a copy so that no build folder stays behind."""
    copy = tmp_path_factory.mktemp("source")
    for part in PARTS:
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    wheels = tmp_path_factory.mktemp("wheels")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(wheels), str(copy)], check=True, capture_output=True)
    (wheel,) = wheels.glob("*.whl")
    target = tmp_path_factory.mktemp("target")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def python(installed: Path, cwd: Path, *arguments: str) -> str:
    """What the installed package prints, run from another folder."""
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_wheel_puts_four_names_at_the_top_and_no_tools(installed: Path) -> None:
    names = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert names == {"kvmerge", "baselines", "benchmarks", "harness"}


def test_a_wheel_holds_every_module_and_data_file_of_its_folders(installed: Path) -> None:
    homes = {"configs": "kvmerge/configs", "results/reference": "harness/report/reference"}
    for part in PARTS:
        for path in (ROOT / part).rglob("*"):
            if path.suffix in (".py", ".yaml", ".txt", ".json", ".csv", ".j2", ".css", ".js"):
                inside = installed / homes.get(part, part) / path.relative_to(ROOT / part)
                assert inside.is_file(), f"{path} is not in the wheel; see packages in pyproject.toml"


def test_every_package_is_listed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    code = {
        str(path.parent.relative_to(ROOT)).replace("/", ".")
        for part in ("kvmerge", "baselines", "benchmarks", "harness")
        for path in (ROOT / part).rglob("__init__.py")
    }
    assert set(listed) == code | {"kvmerge.configs", "harness.report.reference"}


def test_an_installed_wheel_runs_and_has_the_published_numbers(installed: Path, tmp_path: Path) -> None:
    program = (
        "import kvmerge\n"
        "from harness.cli import main\n"
        "from harness.report.published import folder, load_references\n"
        "print(kvmerge.__file__, folder(), len(load_references()), sep='\\n')\n"
        "main()\n"
    )
    # with methods of one's own: beside the user, in a folder, and announced by an installed package
    write(tmp_path, MODULES)
    write(tmp_path / "mine", CONFIGS)
    install(tmp_path, "own_package", {"kvmerge.methods": {"announced": "own_methods:Shortest"}})
    cells = "cells=[full@1,h2o@0.5,mine@0.5,announced@0.5,own_methods.Shortest@0.35]"
    run = ["model=tiny-random", "benchmark.tasks=[passkey]", "limit=1", cells, "--config-dir", "mine"]
    home, published, count, *printed = python(installed, tmp_path, "-c", program, *run).splitlines()
    assert Path(home).is_relative_to(installed)
    assert Path(published).is_relative_to(installed)
    assert int(count) > 70
    assert any("passkey" in line for line in printed)
    (records,) = (tmp_path / "results" / "runs").glob("cells/*/*/predictions/passkey")
    assert {path.stem for path in records.glob("*.jsonl")} == {
        *("full@1", "h2o@0.5", "mine@0.5", "announced@0.5"),
        "own_methods.Shortest@0.35",
    }


def test_an_installed_wheel_holds_a_method_from_anywhere_to_the_contract(
    installed: Path, tmp_path: Path
) -> None:
    write(tmp_path, MODULES)
    said = python(installed, tmp_path, "-m", "kvmerge.check", "own_methods.Shortest", "recent=2")
    assert "  holds   positions ascend within the prompt" in said
    assert " 0 are broken" in said
