"""A noise run changes one thing at a time, resumes, and goes on where a variant cannot."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from rich.console import Console

import harness.noise as module
from harness.failures import Failure, SamplesFailed
from harness.lock import FILE as LOCK
from harness.lock import only_writer
from harness.noise import noise, planned
from harness.records import Record
from harness.results import Results
from harness.settings import Settings
from harness.variants import FILE
from kvmerge.errors import Infeasible, UserError
from kvmerge.kernels import tiled
from tests.conftest import Output
from tests.tiny_run import compose

Tiny = Callable[..., Settings]
CELLS = "cells=[full@1,h2o@0.35]"
SMALL = (
    *("vary.batch_sizes=[1]", "vary.threads=[1,2]", "vary.dtypes=[float32,bfloat16]"),
    "vary.kernels=[tiled-torch,tiled-onednn,flash-cpu,unpacked,sdpa]",
)


@pytest.fixture
def measured(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Settings]:
    """Settings of a noise run with the tiny model on a task, whose base has one thread."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: threads.__setitem__(0, count))
    threads = [1]
    # prompts of the tiny model are short, and the choice between libraries is one of long ones
    monkeypatch.setattr(tiled, "_WORTH_A_CHOICE", 1)
    monkeypatch.setenv("KVMERGE_CPU_PRODUCTS", "torch")

    def settings(*overrides: str) -> Settings:
        given = {text.partition("=")[0] for text in overrides}
        defaults = [text for text in (*SMALL, CELLS) if text.partition("=")[0] not in given]
        return tiny("experiment=noise", "benchmark.tasks=[trec]", "limit=2", *defaults, *overrides)

    return settings


def carry_out(settings: Settings) -> str:
    console = Console(file=io.StringIO(), width=200)
    noise(settings, console)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def records(settings: Settings, variant: str) -> list[Record]:
    return Results(settings.output_dir / "variants" / variant).records("trec", "h2o@0.35")


def how(settings: Settings, variant: str) -> tuple[int | None, int | None, str | None]:
    (found,) = {(r.batch_samples, r.threads, r.kernel) for r in records(settings, variant)}
    return found


def test_each_variant_changes_one_thing_and_records_say_so(
    measured: Callable[..., Settings],
) -> None:
    settings = measured()
    shown = carry_out(settings)
    packed = "tiled-torch+packed/float32"
    assert {path.name: how(settings, path.name) for path in settings.output_dir.glob("variants/*")} == {
        "base": (2, 1, packed),
        "batch-1": (1, 1, packed),
        "threads-2": (2, 2, packed),
        "tiled-onednn": (2, 1, "tiled-onednn+packed/float32"),
        "flash-cpu": (2, 1, "flash-cpu+packed/float32"),
        "unpacked": (2, 1, "tiled-torch/float32"),
        "bfloat16": (2, 1, "flash-cpu/bfloat16"),
    }
    assert torch.get_num_threads() == 1
    listed = json.loads((settings.output_dir / FILE).read_text())["variants"]
    obstacles = {each["name"]: each["obstacle"] for each in listed if each["obstacle"]}
    assert obstacles == {"tiled-torch": "the kernel of the base", "sdpa": "a kernel of GPUs"}
    assert "variant 2 of 9: batch-1" in shown
    assert "sdpa: not run, a kernel of GPUs" in shown
    assert "Noise by variant" in shown
    table = pd.read_csv(settings.output_dir / "tables" / "noise_by_variant.csv")
    assert len(table) == 6
    assert not (settings.output_dir / LOCK).exists()


def test_other_threads_multiply_by_the_library_of_the_base(
    measured: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KVMERGE_CPU_PRODUCTS")
    fastest = {1: "onednn", 2: "torch"}
    monkeypatch.setattr(
        "kvmerge.kernels.choice._kept", lambda machine: fastest[torch.get_num_threads()]
    )
    monkeypatch.setattr("kvmerge.kernels.choice._taken", {})
    settings = measured("vary.batch_sizes=[]", "vary.kernels=[]", "vary.dtypes=[]")
    carry_out(settings)
    kernel = "tiled-onednn+packed/float32"
    assert how(settings, "base") == (2, 1, kernel)
    assert how(settings, "threads-2") == (2, 2, kernel)


def test_a_killed_run_goes_on_with_the_variant_that_it_was_at(
    measured: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = measured("vary.kernels=[]", "vary.threads=[1]")
    original = module.run
    ran: list[str] = []

    def killed(of: Settings, **options: Any) -> Results:
        if of.output_dir.name == "batch-1":
            raise KeyboardInterrupt
        return original(of, **options)

    monkeypatch.setattr(module, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        carry_out(settings)
    assert not (settings.output_dir / FILE).exists()

    def counted(of: Settings, **options: Any) -> Results:
        if options["loaded"] is not None:
            ran.append(of.output_dir.name)
        return original(of, **options)

    monkeypatch.setattr(module, "run", counted)
    before = records(settings, "base")
    carry_out(settings)
    assert ran == ["batch-1", "bfloat16"]
    assert records(settings, "base") == before
    assert (settings.output_dir / FILE).exists()


def test_weights_are_loaded_once_for_all_variants_that_share_them(
    measured: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    original = module.load
    monkeypatch.setattr(
        module, "load", lambda spec, known: loaded.append(spec.dtype) or original(spec, known)
    )
    settings = measured("vary.kernels=[]")
    carry_out(settings)
    assert loaded == ["float32", "bfloat16"]
    carry_out(settings)  # nothing is left to run
    assert loaded == ["float32", "bfloat16"]


def test_what_a_variant_cannot_do_here_is_said_and_the_others_go_on(
    measured: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = module.run
    errors = {
        "bfloat16": Infeasible("keys are not finite"),
        "float16": RuntimeError("\"addmm\" not implemented for 'Half'"),
    }

    def run(of: Settings, **options: Any) -> Results:
        if of.output_dir.name in errors:
            raise errors[of.output_dir.name]
        return original(of, **options)

    monkeypatch.setattr(module, "run", run)
    kept = "vary.kernels=[]", "vary.threads=[1]"
    settings = measured(*kept, "vary.dtypes=[bfloat16,float16]")
    shown = carry_out(settings)
    assert "bfloat16: given up, keys are not finite" in shown
    assert "float16 says nothing: \"addmm\" not implemented for 'Half'." in shown
    assert "batch-1" in (settings.output_dir / "tables" / "noise_by_variant.md").read_text()
    errors["bfloat16"] = UserError("the disk is full")
    with pytest.raises(UserError, match="the disk is full"):
        carry_out(settings)


def test_a_base_that_cannot_run_is_an_error(
    measured: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(of: Settings, **options: Any) -> Results:
        raise Infeasible("out of memory")

    monkeypatch.setattr(module, "run", run)
    with pytest.raises(Infeasible, match="out of memory"):
        carry_out(measured())


def test_another_setting_is_refused_before_anything_runs(
    measured: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = "vary.kernels=[]", "vary.threads=[1]", "vary.dtypes=[]"
    carry_out(measured(*kept))
    monkeypatch.setattr(module, "run", lambda *_, **__: pytest.fail("nothing may run"))
    with pytest.raises(UserError, match=r"made with another seed: 0 then, 5 now"):
        carry_out(measured(*kept, "seed=5"))


def test_one_process_at_a_time(measured: Callable[..., Settings]) -> None:
    settings = measured()
    with only_writer(settings.output_dir), pytest.raises(UserError, match="is being written by"):
        carry_out(settings)


def test_a_plan_names_the_variants_and_touches_nothing(measured: Callable[..., Settings]) -> None:
    settings = measured("dry_run=true")
    shown = carry_out(settings)
    names = "base, batch-1, threads-2, tiled-torch, tiled-onednn, flash-cpu, unpacked, bfloat16"
    assert f"8 such runs, each of which resumes: {names}" in shown
    assert "not run: sdpa, a kernel of GPUs" in shown
    assert not settings.output_dir.exists()


def test_what_the_base_has_already_is_no_variant(measured: Callable[..., Settings]) -> None:
    settings = measured(
        *("batch_size=4", "vary.batch_sizes=[4,8,8]", "vary.threads=[1]"),
        *("vary.kernels=[]", "vary.dtypes=[float32]"),
    )
    assert torch.get_num_threads() == 1
    assert [(each.name, each.setting) for each in planned(settings)] == [
        ("base", ""),
        ("batch-8", "batch_size"),
    ]


def test_threads_say_nothing_of_a_model_on_a_gpu(
    measured: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = measured()
    monkeypatch.setattr(type(settings.model), "torch_device", lambda _: torch.device("cuda"))
    obstacles = {each.name: each.obstacle for each in planned(settings) if each.obstacle}
    assert obstacles == {
        "threads-2": "the model computes on cuda",
        **dict.fromkeys(("tiled-torch", "tiled-onednn", "flash-cpu"), "a kernel of CPUs"),
        "unpacked": "linear layers are not packed here",
    }


def test_threads_are_by_default_powers_of_two_up_to_the_processors(
    measured: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "usable_processors", lambda: 6)
    names = [each.name for each in planned(measured("vary.threads=null"))]
    assert [name for name in names if name.startswith("threads")] == ["threads-2", "threads-4"]


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("vary.threads=[0]", r"vary\.threads=\[0\] must be a list, each entry a whole number of 1"),
        ("vary.batch_sizes=[two]", r"vary\.batch_sizes=\['two'\] must be a list, each entry a whole"),
        ("vary.dtypes=[int8]", r"unknown entry of vary\.dtypes 'int8'.*bfloat16, float16, float32"),
        ("vary.kernels=[flsh]", r"unknown entry of vary\.kernels 'flsh'. Did you mean 'flash'"),
        ("vary.thread=[1]", r"unknown setting of vary 'thread'"),
        ("margin=2", "kind=noise compares no two methods, so margin cannot be given"),
        ("noise=x", "so noise cannot be given"),
    ],
)
def test_values_that_cannot_be_are_refused_by_name(
    measured: Callable[..., Settings], given: str, why: str
) -> None:
    with pytest.raises(UserError, match=why):
        measured(given)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("num_shards=2", "measured by one process"),
        ("cells=[h2o@0.35]", "add full@1 to the cells"),
    ],
)
def test_a_run_that_is_no_noise_floor_is_refused(
    measured: Callable[..., Settings], given: str, why: str
) -> None:
    with pytest.raises(UserError, match=why):
        planned(measured(given))


def test_a_folder_with_predictions_of_its_own_is_refused(measured: Callable[..., Settings]) -> None:
    settings = measured()
    (settings.output_dir / "predictions").mkdir(parents=True)
    with pytest.raises(UserError, match="another kind of run"):
        planned(settings)


def test_other_kinds_have_no_variants() -> None:
    with pytest.raises(UserError, match=r"vary\.threads belongs to another kind.*experiment=noise"):
        compose("experiment=mini", "vary.threads=[1]")


def test_whatever_its_cells_it_writes_where_the_report_looks() -> None:
    settings = compose("experiment=noise", CELLS)
    assert settings.output_dir == Path("results/runs/noise/mini/smollm2-135m")


def test_a_comparison_is_told_of_a_wrong_floor_before_it_runs(
    command: Callable[..., Output], tmp_path: Path
) -> None:
    base = {"name": "base", "setting": "", "obstacle": ""}
    content = {"model": "a", "benchmark": "b", "variants": [base]}
    (tmp_path / FILE).write_text(json.dumps(content))
    done = command("method=h2o", "limit=1", "model=tiny-random", f"noise={tmp_path}", "output_dir=out")
    assert done.status == 2
    assert "was measured with model a, and this run has tiny-random" in done.err
    assert not Path("out/predictions").exists()


@pytest.mark.parametrize(
    ("errors", "given_up"),
    [
        (["NotFinite: task trec, sample 'a' (9 prompt tokens): keys are not finite"], True),
        (["RuntimeError: \"addmm\" not implemented for 'Half'", "NotFinite: of another"], True),
        (["NotFinite: of one", "KeyError: of another"], False),
    ],
)
def test_a_variant_is_given_up_only_where_all_its_samples_failed_by_the_device(
    tmp_path: Path, errors: list[str], given_up: bool
) -> None:
    failures = [
        Failure(task="trec", id=str(number), cells=[], error=error, traceback="", time="")
        for number, error in enumerate(errors)
    ]
    assert module._is_not_for_here(SamplesFailed("some failed", failures)) is given_up
