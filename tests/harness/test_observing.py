"""Whole runs that observe a tiny random model: what is recorded, what is run again, what is refused."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import harness.observing
from harness.failures import FILE, Failure
from harness.lock import only_writer
from harness.observation import Observation, Observed, read_maps, read_observations
from harness.observing import observe_all
from harness.report.page import main as report
from harness.runner import run
from harness.settings import Settings
from kvmerge.errors import UserError
from tests.conftest import Output
from tests.tiny import HEADS, LAYERS
from tests.tiny_run import TASKS, compose, row, tiny_settings, write_rows

FIELDS = [
    "id",
    "prompt_hash",
    "prompt_tokens",
    "layers",
    "cosine",
    "ratio",
    "sizes",
    "distance",
    "sigma",
    "entropy",
    "flatness",
    "seconds",
]
TABLES = {"claims", "cosine", "cosine_by_head", "ratio", "variance", "sets", "entropy", "samples"}
FIGURES = {
    "cosine_maps",
    "cosine_by_distance",
    "ratio_by_layer",
    "ratio_variance",
    "sets_by_layer",
    "entropy_by_layer",
}
Observing = Callable[..., Settings]


def observing_settings(checkpoint: Path, rows: Path, folder: Path, *overrides: str) -> Settings:
    return compose(
        "experiment=observations",
        "benchmark=longbench",
        f"benchmark.data_dir={rows}",
        f"benchmark.tasks=[{','.join(TASKS)}]",
        f"model.path={checkpoint}",
        f"output_dir={folder}",
        *overrides,
    )


@pytest.fixture
def observing(checkpoint: Path, data: Path, tmp_path: Path) -> Observing:
    """Settings of a run that observes all four tasks; overrides change them."""

    def settings(*overrides: str, folder: Path = tmp_path / "out", rows: Path = data) -> Settings:
        return observing_settings(checkpoint, rows, folder, *overrides)

    return settings


@pytest.fixture(scope="module")
def finished(checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run with its report; not to be changed."""
    folder = tmp_path_factory.mktemp("observed") / "out"
    observe_all(observing_settings(checkpoint, data, folder))
    assert report([str(folder)]) == 0
    return folder


def lines(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Every line by task and id, without its time."""
    found = {}
    for path in sorted(folder.glob("observations/*.jsonl")):
        for text in path.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            key = path.stem, line["id"]
            assert key not in found, f"{key} is there twice"
            found[key] = {name: value for name, value in line.items() if name != "seconds"}
    return found


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the prompts that were observed, in order."""
    lengths: list[int] = []
    original = harness.observing.observe

    def counted(model: Any, input_ids: Any, *arguments: Any, **named: Any) -> Any:
        lengths.append(input_ids.shape[1])
        return original(model, input_ids, *arguments, **named)

    monkeypatch.setattr(harness.observing, "observe", counted)
    return lengths


# what is written


def test_there_is_a_line_for_every_sample_with_every_field(finished: Path) -> None:
    found = lines(finished)
    assert set(found) == {(task, f"{task}-{number}") for task in TASKS for number in range(3)}
    for line in found.values():
        assert [*line, "seconds"] == FIELDS
        assert line["layers"] == list(range(LAYERS))
        assert np.shape(line["cosine"]["keys"]) == (LAYERS, 2, 20)
        assert np.shape(line["ratio"]) == (LAYERS, 2, 8)
        assert np.shape(line["entropy"]) == (LAYERS, HEADS)


def test_a_run_that_observes_answers_nothing(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {
        "observations",
        "run.json",
        "maps.npz",
        "tables",
        "plots",
    }
    info = json.loads((finished / "run.json").read_text())
    assert info["cells"] == []
    assert info["fingerprint"]["observe"]["epsilon"] == 0.75
    assert "map_layers" not in info["fingerprint"]["observe"]
    assert info["runs"][-1]["seconds"] is not None


def test_every_table_and_figure_is_written(finished: Path) -> None:
    assert {path.stem for path in (finished / "tables").iterdir()} == TABLES
    for kind in ("png", "pdf"):
        assert {path.stem for path in (finished / "plots").glob(f"*.{kind}")} == FIGURES
    for name in TABLES:
        assert len(pd.read_csv(finished / "tables" / f"{name}.csv")) > 0


def test_the_tables_hold_the_means_of_the_lines(finished: Path) -> None:
    found = lines(finished)
    ratio = pd.read_csv(finished / "tables" / "ratio.csv")
    for task in TASKS:
        of_task = [line["ratio"] for (name, _), line in found.items() if name == task]
        wanted = np.mean(of_task, axis=(0, 2))  # over samples and heads: layer, threshold
        shown = ratio[ratio.task == task].pivot(index="layer", columns="threshold", values="ratio")
        np.testing.assert_allclose(shown.to_numpy(), wanted, atol=1e-9)
    whole = ratio[ratio.task == "all"].pivot(index="layer", columns="threshold", values="ratio")
    wanted = np.mean([line["ratio"] for line in found.values()], axis=(0, 2))
    np.testing.assert_allclose(whole.to_numpy(), wanted, atol=1e-9)
    assert (ratio.low <= ratio.ratio + 1e-9).all()
    assert (ratio.ratio <= ratio.high + 1e-9).all()


def test_the_maps_are_of_the_first_sample(finished: Path) -> None:
    maps = read_maps(finished / "maps.npz")
    assert maps is not None
    assert str(maps["sample"]) == "qasper/qasper-0"
    assert maps["layers"].tolist() == [0, 1]
    assert maps["heads"].tolist() == [0, 1]
    tokens = lines(finished)["qasper", "qasper-0"]["prompt_tokens"]
    side = -(-tokens // int(maps["block"]))
    assert maps["maps"].shape == (2, 2, side, side)


def test_a_report_from_the_records_is_the_same_again(finished: Path, tmp_path: Path) -> None:
    assert report([str(finished), "--out", str(tmp_path)]) == 0
    for path in (finished / "tables").iterdir():
        assert path.read_bytes() == (tmp_path / "tables" / path.name).read_bytes()


def test_the_command_shows_each_claim_and_names_the_files(command: Callable[..., Output]) -> None:
    words = ("model=tiny-random", "benchmark.tasks=[passkey,quotation]", "limit=2")
    done = command("experiment=observations", *words)
    assert done.status == 0, done.err
    assert "The likeness of keys is local" in done.out
    assert "results/runs/observations/mini/tiny-random/tables" in done.out
    assert "n = 2 samples a task" in done.out
    again = command("experiment=observations", *words)
    assert again.out == done.out
    assert "observing" not in again.err


# going on


def test_a_run_that_was_stopped_goes_on_where_it_was(
    observing: Observing, finished: Path, seen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = harness.observing.observe

    def stopped(*arguments: Any, **named: Any) -> Any:
        if len(seen) == 5:
            raise KeyboardInterrupt
        return counted(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(harness.observing, "observe", stopped)
        with pytest.raises(KeyboardInterrupt):
            observe_all(observing())
    assert len(seen) == 5
    results = observe_all(observing())
    assert len(seen) == 12
    assert lines(results.folder) == lines(finished)
    observe_all(observing())
    assert len(seen) == 12


def test_more_samples_are_added_to_those_that_are_there(
    observing: Observing, finished: Path, seen: list[int]
) -> None:
    observe_all(observing("limit=1"))
    results = observe_all(observing())
    assert len(seen) == 12
    assert lines(results.folder) == lines(finished)


def test_a_half_written_last_line_is_observed_again(observing: Observing, finished: Path) -> None:
    folder = observe_all(observing("benchmark.tasks=[trec]")).folder
    path = folder / "observations" / "trec.jsonl"
    path.write_bytes(path.read_bytes()[:-200])
    observe_all(observing("benchmark.tasks=[trec]"))
    assert lines(folder) == {key: line for key, line in lines(finished).items() if key[0] == "trec"}


def test_other_maps_are_drawn_without_a_second_line(observing: Observing, seen: list[int]) -> None:
    observe_all(observing("limit=1"))
    other = ("observe.map_sample=lcc/lcc-0", "observe.map_layers=[-1]", "observe.map_heads=[1]")
    results = observe_all(observing("limit=1", *other))
    assert len(seen) == 5
    assert len(lines(results.folder)) == 4
    maps = read_maps(results.map_file)
    assert maps is not None
    assert str(maps["sample"]) == "lcc/lcc-0"
    assert (maps["layers"].tolist(), maps["heads"].tolist()) == ([1], [1])


def test_maps_that_were_damaged_are_drawn_again(observing: Observing) -> None:
    results = observe_all(observing("limit=1"))
    whole = results.map_file.read_bytes()
    results.map_file.write_bytes(whole[: len(whole) // 2])
    observe_all(observing("limit=1"))
    assert read_maps(results.map_file) is not None


def test_shards_together_are_the_whole_run(
    observing: Observing, finished: Path, tmp_path: Path
) -> None:
    for shard in (1, 0):
        observe_all(observing(f"shard={shard}", "num_shards=2"))
    assert not (tmp_path / "out/shards/1-of-2/maps.npz").exists()
    assert report([str(tmp_path / "out")]) == 0
    for path in (finished / "tables").iterdir():
        assert path.read_bytes() == (tmp_path / "out/tables" / path.name).read_bytes()


def test_a_missing_shard_is_named(observing: Observing, tmp_path: Path, capsys: Any) -> None:
    observe_all(observing("shard=0", "num_shards=2", "limit=2"))
    assert report([str(tmp_path / "out")]) == 2
    assert "lacks 1-of-2" in capsys.readouterr().err


# what fails


def break_prompt(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let the prompt of this number, among those observed from now on, raise."""
    honest, asked = harness.observing.observe, itertools.count()

    def failing(*arguments: Any, **named: Any) -> Any:
        if next(asked) == number:
            raise RuntimeError("a fault\nof two lines")
        return honest(*arguments, **named)

    monkeypatch.setattr(harness.observing, "observe", failing)


def test_a_sample_that_raises_is_told_and_the_next_run_tries_it_again(
    observing: Observing, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_prompt(monkeypatch, 1)
    results = observe_all(observing("benchmark.tasks=[trec]"))
    assert [sample for _, sample in lines(results.folder)] == ["trec-0", "trec-2"]
    (failure,) = [json.loads(text) for text in (results.folder / FILE).read_text().splitlines()]
    assert (failure["task"], failure["id"], failure["cells"]) == ("trec", "trec-1", [])
    assert failure["error"] == "RuntimeError: a fault"
    assert "in failing" in failure["traceback"]
    assert [each.id for each in results.failures.new] == ["trec-1"]
    again = observe_all(observing("benchmark.tasks=[trec]"))
    assert not again.failures.new
    assert not (results.folder / FILE).exists()
    assert lines(results.folder) == {key: of for key, of in lines(finished).items() if key[0] == "trec"}


def test_where_the_first_sample_raises_the_next_one_gives_the_maps(
    observing: Observing, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_prompt(monkeypatch, 0)
    maps = read_maps(observe_all(observing("benchmark.tasks=[trec]")).map_file)
    assert maps is not None
    assert str(maps["sample"]) == "trec/trec-1"


def test_a_failure_whose_sample_was_observed_since_is_taken_out(observing: Observing) -> None:
    results = observe_all(observing("limit=1"))
    results.failures.add(
        Failure(task="lcc", id="lcc-0", cells=[], error="e", traceback="t", time="now")
    )
    observe_all(observing("limit=1"))
    assert not (results.folder / FILE).exists()


def test_an_error_that_every_sample_would_meet_ends_the_run(
    observing: Observing, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise UserError("no such thing")

    monkeypatch.setattr(harness.observing, "observe", refused)
    with pytest.raises(UserError, match=r"task trec, sample 'trec-0' .*: no such thing"):
        observe_all(observing("benchmark.tasks=[trec]"))


def test_a_command_lists_those_that_failed_and_exits_with_3(
    command: Callable[..., Output],
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: Path,
    data: Path,
    tmp_path: Path,
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise KeyError("x")

    monkeypatch.setattr(harness.observing, "observe", broken)
    given = ["experiment=observations", f"model.path={checkpoint}", "benchmark=longbench"]
    given += [f"benchmark.data_dir={data}", "benchmark.tasks=[trec]", f"output_dir={tmp_path}"]
    done = command(*given)
    assert done.status == 3
    assert "error: 3 samples failed; the others are done." in done.err
    assert done.err.count("KeyError: 'x'") == 3


# a plan


def test_a_plan_loads_and_writes_nothing(
    command: Callable[..., Output], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.observing.load", lambda *_: pytest.fail("the model was loaded"))
    done = command("experiment=observations", "limit=2", "dry_run=true")
    assert done.status == 0, done.err
    assert "prefill: one per sample, " in done.out
    assert "decode" not in done.out
    assert "answers" not in done.out
    assert not list(Path().rglob("*.json*"))


# short prompts


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_a_prompt_of_a_few_tokens_is_observed_and_reported(
    command: Callable[..., Output], tmp_path: Path, tokens: int
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"x": "' + "a" * tokens + '", "y": "b"}\n')
    (tmp_path / "template.txt").write_text("{x}")
    done = command(
        "experiment=observations",
        "model=tiny-random",
        "benchmark=custom",
        f"benchmark.dataset={tmp_path / 'rows.jsonl'}",
        f"benchmark.template={tmp_path / 'template.txt'}",
        "benchmark.answers=y",
        "benchmark.chat=false",
        f"output_dir={tmp_path / 'out'}",
    )
    assert done.status == 0, done.err
    (line,) = lines(tmp_path / "out").values()
    assert tokens <= line["prompt_tokens"] <= tokens + 1
    assert "undecided" in done.out
    drawn = {path.stem for path in (tmp_path / "out/plots").glob("*.png")}
    assert drawn == FIGURES - {"ratio_variance"}


# what is refused


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["budget=0.5"], "budget cannot be given as well"),
        (["cells=[full@1]", "seed=2"], "cells and seed cannot be given as well"),
        (["margin=2", "flips.well=60"], "flips.well and margin cannot be given as well"),
        (["method.sigma=3"], "method.sigma cannot be given as well"),
        (["observe.linkage=anchr"], "unknown linkage 'anchr'. Did you mean 'anchor'"),
        (["observe.linkge=anchor"], "unknown setting of observe 'linkge'. Did you mean 'linkage'"),
        (["observe.distances=[0]"], "observe.distances=.* each entry a whole number of 1 or more"),
        (["observe.distances=[2,1]"], "distances=.* rising numbers"),
        (["observe.thresholds=[2.0]"], "a cosine lies between -1 and 1"),
        (["observe.entropy_rows=0"], "observe.entropy_rows=0 must be a whole number of 1 or more"),
        (["observe.protect=7.5"], "protect=7.5 is no budget"),
        (["observe.map_heads=[-1]"], "observe.map_heads=.* each entry a whole number of 0 or more"),
        (["observe=3"], "observe=3 must be a mapping"),
    ],
)
def test_settings_that_cannot_be_are_refused(words: list[str], why: str) -> None:
    with pytest.raises(UserError, match=why):
        compose("experiment=observations", *words)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["observe.linkage=anchor"], r"observe\.linkage belongs to another kind of run. Give exp"),
        (["selfcheck.tokens=4"], r"selfcheck\.tokens belongs to another kind of run"),
        (["+observe={}"], "observe=... belongs to kind=observations, and kind=comparison was given"),
        (
            ["kind=observations"],
            "kind=observations needs its options, observe; experiment=observations",
        ),
    ],
)
def test_settings_of_another_kind_of_run_are_refused(words: list[str], why: str) -> None:
    with pytest.raises(UserError, match=why):
        compose(*words)


@pytest.mark.parametrize(
    ("word", "why"),
    [
        ("observe.map_layers=[2]", r"map_layers=\[2\]: the model has 2 layers, 0 to 1"),
        ("observe.map_heads=[2]", r"map_heads=\[2\]: the model has 2 KV heads, 0 to 1"),
        ("observe.map_sample=trec/tec-0", "unknown observe.map_sample.*Did you mean 'trec/trec-0'"),
    ],
)
def test_what_the_model_or_data_does_not_have_is_named(
    observing: Observing, word: str, why: str
) -> None:
    rows = ["benchmark.tasks=[trec]"] if "trec" in word else []
    with pytest.raises(UserError, match=why):
        observe_all(observing(word, *rows))


def test_another_setting_is_refused_in_the_same_folder(observing: Observing) -> None:
    observe_all(observing("limit=1"))
    with pytest.raises(UserError, match=r"another observe\.epsilon: 0\.75 then, 0\.8 now"):
        observe_all(observing("limit=1", "observe.epsilon=0.8"))


def test_answers_and_observations_do_not_share_a_folder(
    observing: Observing, checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    answering = tiny_settings(checkpoint, data, tmp_path / "out", "cells=[h2o@0.5]", "limit=1")
    observe_all(observing("limit=1"))
    with pytest.raises(UserError, match="holds observations, so no predictions go there"):
        run(answering)
    other = tiny_settings(checkpoint, data, tmp_path / "other", "cells=[h2o@0.5]", "limit=1")
    run(other)
    with pytest.raises(UserError, match="holds predictions, so no observations go there"):
        observe_all(observing("limit=1", folder=tmp_path / "other"))


def test_shards_and_a_whole_run_do_not_share_a_folder(observing: Observing) -> None:
    observe_all(observing("limit=1"))
    with pytest.raises(UserError, match="num_shards=1, so num_shards=2 cannot be added"):
        observe_all(observing("limit=1", "num_shards=2"))


def test_a_second_writer_is_refused(command: Callable[..., Output], tmp_path: Path) -> None:
    with only_writer(tmp_path / "out"):
        done = command(
            "experiment=observations", "model=tiny-random", "limit=1", f"output_dir={tmp_path / 'out'}"
        )
    assert done.status == 2
    assert "is being written by process" in done.err


def test_a_prompt_that_changed_is_refused(observing: Observing, data: Path, tmp_path: Path) -> None:
    folder = observe_all(observing("limit=1", "benchmark.tasks=[trec]")).folder
    path = folder / "observations" / "trec.jsonl"
    line = json.loads(path.read_text())
    path.write_text(json.dumps(line | {"prompt_hash": "0" * 16}) + "\n")
    with pytest.raises(UserError, match="the prompt is not the one"):
        observe_all(observing("benchmark.tasks=[trec]"))


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        ({"ratio": [[[2.0] * 8] * 2] * 2}, "ratio.* must be .*0 to 1, got 2.0"),
        ({"layers": [0]}, "has 2 layers, not 1"),
        ({"entropy": [[1.0], [1.0, 2.0]]}, "entropy has lists of different lengths"),
        ({"extra": 1}, "extra is no field"),
        ({"id": None}, "id must be a string"),
    ],
)
def test_a_damaged_line_is_refused_by_file_and_line(
    finished: Path, tmp_path: Path, damage: dict[str, Any], why: str
) -> None:
    whole = (finished / "observations/trec.jsonl").read_text().splitlines()
    broken = json.dumps(json.loads(whole[1]) | damage)
    path = tmp_path / "trec.jsonl"
    path.write_text("\n".join([whole[0], broken, whole[2]]) + "\n")
    with pytest.raises(UserError, match=rf"trec.jsonl, line 2 is not an observation: .*{why}"):
        read_observations(path)


def test_a_sample_that_is_there_twice_is_refused(finished: Path, tmp_path: Path) -> None:
    text = (finished / "observations/trec.jsonl").read_text()
    (tmp_path / "trec.jsonl").write_text(text + text.splitlines()[0] + "\n")
    with pytest.raises(UserError, match="line 4: sample 'trec-0' is there twice"):
        read_observations(tmp_path / "trec.jsonl")


def test_a_line_of_other_shapes_is_refused_by_the_report(
    observing: Observing, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = observe_all(observing("benchmark.tasks=[trec]")).folder
    path = folder / "observations/trec.jsonl"
    rows = [json.loads(text) for text in path.read_text().splitlines()]
    rows[1]["ratio"] = [[of_head[:-1] for of_head in layer] for layer in rows[1]["ratio"]]
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    assert report([str(folder)]) == 2
    assert "sample 'trec-1' is of other layers, heads" in capsys.readouterr().err


def test_an_observation_survives_its_line(finished: Path) -> None:
    (first, *_) = Observed(finished).observations("lcc")
    assert Observation.from_json(first.to_json()) == first


def test_a_task_without_samples_here_is_left_out(observing: Observing, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows", {task: [row(task, 0)] for task in TASKS})
    results = observe_all(observing("shard=0", "num_shards=2", rows=rows))
    observe_all(observing("shard=1", "num_shards=2", rows=rows))
    assert len(lines(results.folder)) == 4
    assert report([str(tmp_path / "out")]) == 0
