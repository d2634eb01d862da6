from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from harness import provenance
from harness.provenance import check_resumable, fingerprint, git_state, package_versions, run_info
from harness.results import Results
from harness.settings import Settings
from kvmerge.errors import UserError
from kvmerge.models import contents
from tests.tiny_run import compose

Tiny = Callable[..., Settings]

COUNTS = {"trec": 2, "lcc": 5, "qasper": 3, "samsum": 1}
TREC = ("benchmark=longbench", "benchmark.tasks=[trec]")


def prints(*given: str, **data: str) -> dict[str, Any]:
    return fingerprint(compose(*TREC, *given), data or {"trec": "aa"})


def saved(folder: Path, of: dict[str, Any]) -> Path:
    """A folder with a prediction made under a fingerprint."""
    path = folder / "run.json"
    path.write_text(json.dumps({"fingerprint": of}))
    predict(folder)
    return path


def predict(folder: Path, cell: str = "full@1") -> None:
    path = folder / "predictions" / "trec" / f"{cell}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def test_a_fingerprint_survives_json_and_is_the_same_each_time() -> None:
    assert json.loads(json.dumps(prints())) == prints()


@pytest.mark.parametrize(
    "given",
    [
        "limit=3",
        "num_seeds=5",
        "margin=2.5",
        "flips.well=80",
        "output_dir=elsewhere",
        "shard=1 num_shards=2",
        "dry_run=true",
        "fidelity=true",
        "model.shape=null",
    ],
)
def test_what_cannot_change_a_prediction_is_not_in_it(given: str) -> None:
    assert prints(*given.split()) == prints()


@pytest.mark.parametrize(
    ("given", "setting"),
    [
        ("model.dtype=float16", "model.dtype"),
        ("model.path=elsewhere", "model.path"),
        ("model.revision=abc", "model.revision"),
        ("model.chat=none", "model.chat"),
        ("model.stop=[x]", "model.stop"),
        ("model.max_length=100", "model.max_length"),
        ("seed=3", "seed"),
        ("decode_policy=hold", "policy.decode_policy"),
    ],
)
def test_what_can_change_a_prediction_is_refused_by_name(
    tmp_path: Path, given: str, setting: str
) -> None:
    path = saved(tmp_path, prints("cells=[full@1]"))
    with pytest.raises(UserError, match=f"made with another {setting}: .* then, .* now") as caught:
        check_resumable(Results(path.parent), prints("cells=[full@1]", given))
    assert str(tmp_path) in str(caught.value)
    assert "Choose another output_dir" in str(caught.value)


@pytest.mark.parametrize("package", ["torch", "transformers", "tokenizers"])
def test_another_version_of_what_computes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    path = saved(tmp_path, prints())
    monkeypatch.setattr(provenance, "package_versions", lambda: package_versions() | {package: "0.1"})
    with pytest.raises(UserError, match=f"another {package}: .* now"):
        check_resumable(Results(path.parent), prints())


def test_a_local_build_of_the_same_torch_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = package_versions()
    monkeypatch.setattr(provenance, "package_versions", lambda: versions | {"torch": "9.9+cpu"})
    path = saved(tmp_path, prints())
    monkeypatch.setattr(provenance, "package_versions", lambda: versions | {"torch": "9.9+cu128"})
    check_resumable(Results(path.parent), prints())


def test_another_file_of_a_task_is_refused_and_another_task_is_added(tmp_path: Path) -> None:
    path = saved(tmp_path, prints(trec="aa", qasper="bb"))
    with pytest.raises(UserError, match=r"another data\.trec: 'aa' then, 'cc' now"):
        check_resumable(Results(path.parent), prints(trec="cc"))
    merged = check_resumable(Results(path.parent), prints(trec="aa", lcc="dd"))
    assert merged["data"] == {"trec": "aa", "qasper": "bb", "lcc": "dd"}


def test_another_setting_of_a_cell_is_refused_and_another_cell_is_added(tmp_path: Path) -> None:
    earlier = prints("cells=[h2o@0.5,kvmerger@0.5]")
    path = saved(tmp_path, earlier)
    merged = check_resumable(Results(path.parent), prints("cells=[h2o@0.5,'kvmerger:sigma=3@0.5']"))
    assert list(merged["cells"]) == ["h2o@0.5", "kvmerger@0.5", "kvmerger:sigma=3@0.5"]
    assert merged["cells"]["kvmerger:sigma=3@0.5"]["sigma"] == 3
    earlier["cells"]["kvmerger@0.5"]["sigma"] = 4
    saved(tmp_path, earlier)
    now = prints("cells=[h2o@0.5,kvmerger@0.5]")
    check_resumable(Results(path.parent), now)  # no line of it binds anybody
    predict(tmp_path, "kvmerger@0.5")
    predict(tmp_path, "h2o@0.5")
    with pytest.raises(UserError, match=r"\n  kvmerger@0\.5: sigma was 4 and is 5\.0\n") as caught:
        check_resumable(Results(path.parent), now)
    assert "h2o@0.5" not in str(caught.value)
    assert "stale=rerun" in str(caught.value)


def test_a_changed_method_makes_its_own_cells_stale(tmp_path: Path) -> None:
    earlier = prints("cells=[full@1,h2o@0.5,h2o@0.35,cam@0.5]")
    assert {"baselines.h2o", "baselines.heavy_hitters"} <= set(earlier["methods"]["h2o@0.5"])
    assert not set(earlier["methods"]["h2o@0.5"]) & set(earlier["code"])
    for cell in earlier["cells"]:
        predict(tmp_path, cell)
    now = json.loads(json.dumps(earlier))
    for cell in ("h2o@0.5", "h2o@0.35"):
        earlier["methods"][cell]["baselines.h2o"] = "other"
    saved(tmp_path, earlier)
    changed = "baselines.h2o has changed"
    found = provenance.stale_cells(Results(tmp_path), now)
    assert found == {"h2o@0.5": changed, "h2o@0.35": changed}
    others = prints("cells=[full@1,cam@0.5,random@0.5]")
    assert list(check_resumable(Results(tmp_path), others)["cells"]) == [*now["cells"], "random@0.5"]


def test_a_change_of_what_all_pass_through_is_named(tmp_path: Path) -> None:
    earlier = prints()
    earlier["code"]["kvmerge.session"] = "other"
    saved(tmp_path, earlier)
    with pytest.raises(UserError, match=r"another code\.kvmerge\.session: 'other' then"):
        check_resumable(Results(tmp_path), prints())


def test_a_folder_of_a_version_that_digested_all_code_at_once_is_told(tmp_path: Path) -> None:
    saved(tmp_path, prints() | {"code": "a1b2c3"})
    with pytest.raises(UserError, match="a version that did not record code as this one does"):
        check_resumable(Results(tmp_path), prints())


def test_a_thresholds_file_is_what_it_holds(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    cell = f"cells=['kvmerger:budget_mode=eps_layer,thresholds={file}@0.5']"

    def made_of(thresholds: list[float]) -> dict[str, str]:
        file.write_text(json.dumps({"thresholds": thresholds, "linkage": "anchor"}))
        ((_, parts),) = prints(cell)["methods"].items()
        return parts

    first = made_of([0.5, 0.6])
    assert "mine.json" in first
    assert made_of([0.5, 0.6]) == first
    assert made_of([0.5, 0.7]) != first


def in_place(checkpoint: Path, folder: Path) -> tuple[Path, Callable[[], dict[str, Any]]]:
    """A copy of a checkpoint to change, and what its fingerprint is then."""
    shutil.copytree(checkpoint, folder)
    return folder, lambda: prints(f"model.path={folder}")


def test_a_checkpoint_is_what_it_holds_not_where_it_lies(checkpoint: Path, tmp_path: Path) -> None:
    _, here = in_place(checkpoint, tmp_path / "here")
    _, there = in_place(checkpoint, tmp_path / "there")
    assert here() == there()


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"]
)
def test_a_file_that_is_changed_in_place_is_named(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, large: bool
) -> None:
    monkeypatch.setattr(contents, "_WHOLE", 0 if large else 2**30)
    folder, now = in_place(checkpoint, tmp_path / "model")
    saved(tmp_path, now())
    (folder / name).write_text((folder / name).read_text() + "\n")
    with pytest.raises(UserError, match=rf"another contents\.{name}"):
        check_resumable(Results(tmp_path), now())


@pytest.mark.parametrize("large", [False, True])
def test_weights_that_are_negated_in_place_are_others(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    monkeypatch.setattr(contents, "_WHOLE", 0 if large else 2**30)
    folder, now = in_place(checkpoint, tmp_path / "model")
    saved(tmp_path, now())
    path = folder / "model.safetensors"
    before = path.stat()
    save_file({name: -weight for name, weight in load_file(path).items()}, path, {"format": "pt"})
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    with pytest.raises(UserError, match=r"another contents\.model\.safetensors"):
        check_resumable(Results(tmp_path), now())


def test_what_an_older_run_did_not_record_is_told(checkpoint: Path, tmp_path: Path) -> None:
    _, now = in_place(checkpoint, tmp_path / "model")
    older = {key: value for key, value in now().items() if key != "contents"}
    saved(tmp_path, older)
    with pytest.raises(UserError, match="version that did not record contents as this one does, so"):
        check_resumable(Results(tmp_path), now())
    older = {key: value for key, value in prints().items() if key != "contents"}
    saved(tmp_path, older)
    check_resumable(Results(tmp_path), prints())


def write(settings: Settings, prints: dict[str, Any], notes: list[str], **more: Any) -> None:
    """Write run.json as a run does."""
    results = Results(settings.results_dir)
    results.write_info(run_info(settings, results, prints, COUNTS, notes, **more))


def test_a_run_that_failed_before_its_first_prediction_binds_nobody(tiny: Tiny) -> None:
    settings = tiny("seed=3", "cells=[cam@0.01]")
    path = settings.results_dir / "run.json"
    write(settings, prints("seed=3"), [])
    assert check_resumable(Results(path.parent), prints()) == prints()
    write(tiny("cells=[cam@0.5]"), prints(), [])
    assert Results(path.parent).info["cells"] == ["cam@0.5"]


def test_a_new_folder_is_resumable_and_one_without_run_json_is_not(tmp_path: Path) -> None:
    current = prints()
    assert check_resumable(Results(tmp_path / "new"), current) == current
    predict(tmp_path)
    with pytest.raises(UserError, match=r"holds predictions but no run\.json"):
        check_resumable(Results(tmp_path), current)


def test_an_output_dir_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match="Not a directory"):
        check_resumable(Results(tmp_path / "out"), prints())


def test_run_json_says_what_made_the_predictions(tiny: Tiny) -> None:
    settings = tiny("benchmark.tasks=[trec,lcc]", "cells=[full@1,cam@0.5]", "limit=1")
    path = settings.results_dir / "run.json"
    write(settings, fingerprint(settings, {"trec": "aa"}), ["a note"])
    under_way = Results(path.parent).info
    assert under_way["runs"] == [{"ended": None, "seconds": None}]
    write(settings, under_way["fingerprint"], ["a note"], seconds=1.5)

    info = Results(path.parent).info
    assert (info["model"], info["benchmark"]) == (settings.model.name, "longbench")
    assert info["cells"] == ["full@1", "cam@0.5"]
    assert info["tasks"]["trec"] == {
        "metric": "classification",
        "max_new_tokens": 64,
        "samples": 2,
    }
    assert (info["seed"], info["num_seeds"]) == (0, 2)
    assert (info["shard"], info["num_shards"]) == (0, 1)
    assert (info["dtype"], info["notes"]) == ("float32", ["a note"])
    assert info["packages"]["torch"] == version("torch")
    assert info["hardware"]["cores"] == os.cpu_count()
    assert info["config"]["limit"] == 1
    (run,) = info["runs"]
    assert run["seconds"] == 1.5
    assert run["ended"].endswith("+00:00")


def test_run_json_keeps_the_cells_tasks_and_times_of_earlier_runs(tiny: Tiny) -> None:
    for task, cell in (("lcc", "h2o@0.5"), ("trec", "full@1"), ("trec", "h2o@0.5")):
        settings = tiny(f"benchmark.tasks=[{task}]", f"cells=[{cell}]")
        path = settings.results_dir / "run.json"
        write(settings, {}, [], seconds=2.0)
        predict(settings.results_dir)
    info = Results(path.parent).info
    assert info["cells"] == ["h2o@0.5", "full@1"]
    assert list(info["tasks"]) == ["lcc", "trec"]
    assert len(info["runs"]) == 3


def test_a_package_that_is_not_there_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "_PACKAGES", ("torch", "no-such-package"))
    versions = package_versions()
    assert versions == {"torch": version("torch"), "no-such-package": None}


def test_a_folder_that_is_no_checkout_has_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "_ROOT", tmp_path)
    assert git_state() == {"commit": None, "dirty": None}
    (tmp_path / ".git").mkdir()  # a broken one
    assert git_state() == {"commit": None, "dirty": None}
