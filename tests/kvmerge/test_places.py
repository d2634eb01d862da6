"""Where choices are found: the project's folder, the user's, entry points, and classes themselves."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from baselines.h2o import H2O
from kvmerge import compressed
from kvmerge.cells import parse_cell
from kvmerge.errors import UserError
from kvmerge.places import FOLDERS, choices, config_dir, config_dirs, find
from kvmerge.resolve import load_method, method_settings, settings_of
from tests.own_parts import CONFIGS, MODULES, importable, install, write
from tests.tiny import new_model, prompt


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of modules that can be imported."""
    folder = write(tmp_path / "modules", MODULES)
    monkeypatch.syspath_prepend(folder)
    with importable():
        yield folder


@pytest.fixture
def configs(tmp_path: Path, modules: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the user's own choices, looked into."""
    folder = write(tmp_path / "configs", CONFIGS)
    monkeypatch.setenv(FOLDERS, str(folder))
    return folder


# folders


def test_the_users_files_stand_beside_the_projects(configs: Path) -> None:
    assert {"mine", "mine_late", "late_h2o", "h2o"} <= set(choices("method"))
    assert {"mymodel", "tiny-random"} <= set(choices("model"))
    assert "_start" not in choices("method")
    assert method_settings("mine") == {"_target_": "own_methods.Shortest", "recent": 8}
    assert type(load_method("mine")).__name__ == "Shortest"
    assert parse_cell("mine:recent=2@0.35").name == "mine:recent=2@0.35"


def test_a_users_file_starts_from_his_own_and_from_the_projects(configs: Path) -> None:
    assert method_settings("mine_late")["recent"] == 16
    assert load_method("late_h2o") == H2O(recent=2)


def test_a_file_that_starts_from_nothing_known_is_named(configs: Path) -> None:
    path = configs / "method" / "lost.yaml"
    path.write_text("defaults: [nothing]\n")
    with pytest.raises(UserError, match=f"{path} starts from 'nothing', and no method is called that"):
        load_method("lost")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a: [", "cannot read .*bad.yaml: "),
        ("- a\n", "bad.yaml must list settings"),
        ("recent: 3\n", "names no class: its file needs a _target_"),
        ("_target_: own_tasks.Sums\n", r"own_tasks.Sums is no method: a method is a frozen dataclass"),
    ],
)
def test_a_bad_file_is_told_when_it_is_chosen_and_stops_nothing_else(
    configs: Path, text: str, why: str
) -> None:
    (configs / "method" / "bad.yaml").write_text(text)
    assert "bad" in choices("method")
    load_method("mine")
    with pytest.raises(UserError, match=why):
        load_method("bad")


def test_a_name_in_two_folders_is_refused_with_both_files(configs: Path, tmp_path: Path) -> None:
    (configs / "method" / "h2o.yaml").write_text("_target_: own_methods.Shortest\n")
    both = f"h2o.yaml is in two places: {config_dir()}/method/h2o.yaml and {configs}/method/h2o.yaml"
    for look in (lambda: choices("model"), lambda: load_method("h2o"), lambda: load_method("mine")):
        with pytest.raises(UserError, match=both):
            look()
    (configs / "method" / "h2o.yaml").unlink()
    other = write(tmp_path / "other", {"method/mine.yaml": CONFIGS["method/mine.yaml"]})
    with (
        pytest.raises(UserError, match=f"{configs}/method/mine.yaml and {other}/method/mine.yaml"),
        config_dirs([str(other)]),
    ):
        pass


def test_a_file_that_serves_others_or_the_run_itself_cannot_be_replaced_either(configs: Path) -> None:
    for name in ("model/_base.yaml", "config.yaml"):
        (configs / name).write_text("a: 1\n")
        with pytest.raises(UserError, match=f"{name} is in two places"):
            choices("method")
        (configs / name).unlink()


def test_folders_may_be_relative_or_of_the_home_and_stay_what_they_were(
    tmp_path: Path, modules: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "here", {"method/one.yaml": CONFIGS["method/mine.yaml"]})
    write(tmp_path / "home" / "there", {"method/two.yaml": CONFIGS["method/mine.yaml"]})
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    before = os.environ.get(FOLDERS)
    with config_dirs(["here", "~/there", "here"]):
        monkeypatch.chdir(modules)
        assert {"one", "two"} <= set(choices("method"))
    assert os.environ.get(FOLDERS) == before
    assert "one" not in choices("method")


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("nowhere", "nowhere, given by --config-dir or KVMERGE_CONFIG_DIR, is not a folder"),
        (
            "empty",
            r"empty, .* holds no choices: .* benchmark/, .*experiment/, .*method/, model/ below it",
        ),
        ("a:b", "--config-dir=a:b holds ':'"),
        ("~no_such_user/x", "--config-dir=~no_such_user/x: "),
    ],
)
def test_what_is_no_folder_of_choices_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, why: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=why), config_dirs([given]):
        pass
    assert FOLDERS not in os.environ


# entry points


def test_an_entry_point_is_a_choice_with_the_defaults_of_its_class(modules: Path) -> None:
    install(modules, "pack", {"kvmerge.methods": {"announced": "own_methods:Shortest"}})
    assert "announced" in choices("method")
    assert "announced" not in choices("benchmark")
    assert method_settings("announced") == {"_target_": "own_methods.Shortest", "recent": 4}
    assert parse_cell("announced:recent=2@0.35").method == load_method(
        "own_methods.Shortest", {"recent": 2}
    )
    model = new_model()
    with compressed(model, "announced", 0.5, recent=3):
        out = model.generate(prompt(40), max_new_tokens=2, return_dict_in_generate=True)
    assert out.sequences.shape[1] == 42


def test_an_entry_point_that_is_broken_is_told_where_it_is_used_and_nowhere_else(modules: Path) -> None:
    broken = {"broken": "own_missing:Method", "lacking": "own_methods:Nothing"}
    install(modules, "pack", {"kvmerge.methods": broken | {"fine": "own_methods:Shortest"}})
    assert {"broken", "lacking", "fine", "h2o"} <= set(choices("method"))
    load_method("fine")
    load_method("h2o")
    with pytest.raises(
        UserError,
        match=r"^method 'broken': own_missing.Method cannot be loaded: No module named 'own_missing'. "
        r"own_missing:Method \(entry point broken of pack\)$",
    ):
        load_method("broken")
    with pytest.raises(UserError, match=r"^method 'lacking': own_methods.Nothing cannot be loaded: "):
        load_method("lacking")


def test_a_name_that_two_announce_is_refused_when_it_is_chosen(modules: Path) -> None:
    install(modules, "pack", {"kvmerge.methods": {"h2o": "own_methods:Shortest", "twin": "a:B"}})
    install(modules, "rival", {"kvmerge.methods": {"twin": "c:D"}})
    load_method("cam")
    with pytest.raises(
        UserError,
        match=r"method h2o is in two places: .*/method/h2o.yaml and "
        r"own_methods:Shortest \(entry point h2o of pack\). Rename one of them",
    ):
        load_method("h2o")
    with pytest.raises(
        UserError, match=r"twin is in two places: a:B .* of pack\) and c:D .* of rival\)"
    ):
        load_method("twin")


# classes themselves


def test_a_class_is_a_choice_by_its_dotted_name(modules: Path) -> None:
    assert find("method", "own_methods.Shortest") == "own_methods.Shortest"
    assert method_settings("own_methods.Shortest") == {"_target_": "own_methods.Shortest", "recent": 4}
    cell = parse_cell("own_methods.Shortest:recent=2@0.35")
    assert cell.name == "own_methods.Shortest:recent=2@0.35"
    assert cell.settings() == {"_target_": "own_methods.Shortest", "recent": 2}
    assert settings_of("benchmark", "own_tasks.Sums") == {
        "_target_": "own_tasks.Sums",
        "count": 3,
        "terms": [1, 2],
    }


def test_a_setting_without_a_default_must_be_given(modules: Path) -> None:
    with pytest.raises(UserError, match=r"own_methods.Demanding needs recent\."):
        parse_cell("own_methods.Demanding@0.5")
    assert parse_cell("own_methods.Demanding:recent=3@0.5").options == (("recent", 3),)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("own_methds.Shortest", r"No module named 'own_methds'. Choices by name: .*cam, "),
        ("own_methods.Shortst", "cannot be loaded: "),
        ("own_methods.not_a_method", "is no method: a method is a frozen dataclass that derives"),
        ("own_tasks.Sums", "own_tasks.Sums is no method"),
        ("os.system", "method 'os.system': os.system is no class"),
        ("os.sep", "os.sep is no class"),
        (
            "own_broken.Method",
            r"own_broken.Method cannot be loaded: ZeroDivisionError: .*own_broken.py, line 2\)",
        ),
        ("own_unread.Method", r"own_unread.Method cannot be loaded: .*own_unread.py, line 1\)"),
    ],
)
def test_what_is_no_method_is_told_in_a_sentence(modules: Path, name: str, why: str) -> None:
    write(modules, {"own_broken.py": "a = 1\n1 / 0\n", "own_unread.py": "a = = 1\n"})
    with pytest.raises(UserError, match=why):
        load_method(name)


@pytest.mark.parametrize(
    "name", ["kvmergr", "h2o.", ".h2o", "a b.c", "../config", "qwen2.5-7b", "", "_base"]
)
def test_a_name_that_can_be_no_classs_is_unknown(name: str) -> None:
    with pytest.raises(UserError, match="unknown method"):
        load_method(name)


def test_an_experiment_is_no_class(modules: Path) -> None:
    with pytest.raises(UserError, match=r"unknown experiment 'own_methods.Shortest'"):
        find("experiment", "own_methods.Shortest")
