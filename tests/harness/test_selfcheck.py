"""The selfcheck says go where all is well, and names what is wrong: each fault here is planted."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

import harness.answering
from baselines.h2o import H2O
from benchmarks.longbench.tasks import TASKS
from harness.checks import (
    Answer,
    Budgets,
    Check,
    Compression,
    PlainTokens,
    Prompt,
    Status,
    golden_prompts,
    rounding,
)
from harness.selfcheck import Verdict, samples_run, selfcheck, whole_tasks
from harness.settings import Settings
from kvmerge.cells import parse_cell
from kvmerge.engine import Comparison
from kvmerge.errors import UserError
from kvmerge.method import Allowance, Entries, PrefillLayer, keep_all
from kvmerge.session import Policy, RowStats
from tests import tiny as tiny_models
from tests.benchmarks.test_wrapped_prompts import GOLDEN
from tests.conftest import Output
from tests.real_tokenizers import TOKENIZERS, load_tokenizer, shared, tokenizer_folder
from tests.shipped import shipped_models
from tests.tiny_run import compose, read_lines

CELLS = "cells=[full@1,kvmerger@0.5,h2o@0.5,h2o@0.35]"
Tiny = Callable[..., Settings]


@pytest.fixture
def checked(tiny: Tiny) -> Callable[..., Settings]:
    """Settings of a selfcheck with the tiny model on two tasks."""

    def settings(*overrides: str) -> Settings:
        defaults = {"cells": CELLS, "benchmark.tasks": "benchmark.tasks=[qasper,trec]"}
        given = {text.partition("=")[0] for text in overrides}
        kept = [text for key, text in defaults.items() if key not in given]
        return tiny("experiment=selfcheck", "selfcheck.tokens=4", *kept, *overrides)

    return settings


def verdict_of(settings: Settings) -> dict[str, Any]:
    """Run a selfcheck; what it wrote."""
    try:
        selfcheck(settings, Console(file=io.StringIO(), width=120))
        raised = ""
    except UserError as error:
        raised = str(error)
    written = json.loads((settings.output_dir / "selfcheck.json").read_text(encoding="utf-8"))
    assert raised == ("" if written["verdict"] == "go" else written["sentence"])
    table = (settings.output_dir / "selfcheck.md").read_text(encoding="utf-8")
    assert f"**{written['sentence']}**" in table
    return dict(written)


def failed(written: dict[str, Any]) -> dict[str, str]:
    return {each["name"]: each["found"] for each in written["checks"] if each["status"] == "failed"}


# --- a path without faults


def test_a_sound_path_says_go_and_what_could_not_be_told(checked: Tiny) -> None:
    settings = checked()
    written = verdict_of(settings)
    assert written["verdict"] == "go"
    assert written["sentence"].startswith(
        "Go: plain generate, budgets, compression, full budgets passed. Not told: golden prompts (no "
    )
    assert "no task scores published for checkpoint0: qasper, trec" in written["sentence"]
    by_name = {each["name"]: each for each in written["checks"]}
    assert by_name["plain generate"]["looked_at"] == "the first 4 tokens of 6 prompts, greedy"
    assert by_name["budgets"]["looked_at"] == "4 cells, every layer and KV head of 6 prompts"
    assert by_name["compression"]["looked_at"] == "3 cells beside the full cache on 6 prompts"
    assert by_name["full budgets"]["looked_at"] == "2 methods at a budget of 1 on 2 prompts"
    assert "all 6 samples of qasper, trec would take" in written["pace"]


def test_its_samples_are_an_ordinary_run_which_is_not_run_again(
    checked: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = checked()
    first = verdict_of(settings)
    lines = read_lines(settings.output_dir / "run")
    assert len(lines) == 6 * 4
    monkeypatch.setattr(harness.answering.Answerer, "answer", lambda *_: pytest.fail("answered again"))
    again = verdict_of(settings)
    assert again["checks"] == first["checks"]
    assert read_lines(settings.output_dir / "run") == lines


def test_what_the_run_would_refuse_is_refused_before_the_model_is_loaded(
    checked: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdict_of(checked())
    monkeypatch.setattr(harness.selfcheck, "load", lambda spec: pytest.fail("the model was loaded"))
    with pytest.raises(UserError, match="dtype"):
        selfcheck(checked("model.dtype=bfloat16"), Console(file=io.StringIO()))


@pytest.mark.parametrize(
    "cell",
    [
        "pyramidkv@0.5",  # divides its budget over layers
        "ada_snapkv@0.5",  # and over heads
        "h2o_sim_decode@0.5",  # hides and keeps all
        "h2o_sim_prefill@0.5",  # alters its prefill
        "kvmerger:budget_mode=eps_free@0.5",  # keeps what a threshold gives
        "cam_hh@0.5",
        "random@20",
    ],
)
def test_every_kind_of_method_passes(checked: Tiny, cell: str) -> None:
    written = verdict_of(checked(f"cells=[full@1,'{cell}']", "benchmark.tasks=[trec]"))
    assert failed(written) == {}


def test_under_hold_every_method_passes_too(checked: Tiny) -> None:
    assert failed(verdict_of(checked("decode_policy=hold", "benchmark.tasks=[trec]"))) == {}


def test_a_budget_above_every_prompt_compresses_nothing_and_says_so(checked: Tiny) -> None:
    written = verdict_of(checked("cells=[full@1,h2o@2000]", "benchmark.tasks=[trec]"))
    by_name = {each["name"]: each for each in written["checks"]}
    assert by_name["compression"]["status"] == "not applicable"
    assert by_name["compression"]["found"] == "no cell's budget is below a prompt's length"


# --- planted faults


def test_a_method_that_keeps_everything_is_named(
    checked: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(H2O, "compress", lambda self, layer, allowance: keep_all(layer))
    found = failed(verdict_of(checked()))
    assert list(found) == ["no silent no-op"]
    assert found["no silent no-op"].startswith(
        "h2o@0.5 on longbench/qasper/qasper-0: layer 0: attention reads "
    )
    assert "kvmerger" not in str(found)


def test_one_entry_too_many_is_named_with_its_place(
    checked: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = H2O.compress

    def greedy(self: H2O, layer: PrefillLayer, allowance: Allowance) -> Entries:
        more = layer.layer_idx == 1
        return honest(self, layer, replace(allowance, n_keep=allowance.n_keep + more))

    monkeypatch.setattr(H2O, "compress", greedy)
    written = verdict_of(checked())
    found = failed(written)
    assert list(found) == ["no silent no-op"]
    assert "on longbench/qasper/qasper-0: layer 1: attention reads" in found["no silent no-op"]
    assert "entries of the prompt in KV head 0, where" in found["no silent no-op"]
    assert written["sentence"].startswith("Stop: no silent no-op: h2o@0.5 on ")


def test_layers_that_a_method_divides_wrongly_are_named(
    checked: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = type(parse_cell("pyramidkv@0.5").method)
    honest = method.allocate

    def greedy(self: Any, layers: Any, allowance: Allowance) -> list[int]:
        first, *others = honest(self, layers, allowance)
        return [first + 1, *others]

    monkeypatch.setattr(method, "allocate", greedy)
    found = failed(verdict_of(checked("cells=[full@1,pyramidkv@0.5]", "benchmark.tasks=[trec]")))
    assert "pyramidkv@0.5 keeps" in found["budgets"]
    assert "over all layers of trec/trec-0" in found["budgets"]


@pytest.mark.parametrize(("heads", "status"), [([9, 11], Status.PASSED), ([9, 12], Status.FAILED)])
def test_heads_that_divide_a_budget_wrongly_are_named(heads: list[int], status: Status) -> None:
    budgets = Budgets(tiny_models.shared_model(), Policy())
    prompt = Prompt("trec/trec-0", "", TASKS[0], tiny_models.prompt(20), frozenset())
    cell = parse_cell("ada_snapkv@0.5")
    budgets.see(prompt, cell, RowStats(entries=[[10, 10], heads]))
    check = budgets.check()
    assert check.status is status
    if status is Status.FAILED:
        assert "ada_snapkv@0.5 keeps 21 entries in layer 1 of trec/trec-0" in check.found
        assert "where 10 a KV head are its budget" in check.found


def test_an_engine_with_another_first_token_is_named(
    checked: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Comparison.prefill

    def turned(self: Comparison, input_ids: torch.Tensor, capacity: int) -> torch.Tensor:
        honest(self, input_ids, capacity)
        self.first_logits = self.first_logits.roll(1, dims=-1)
        return self.first_logits[0]

    monkeypatch.setattr(Comparison, "prefill", turned)
    written = verdict_of(checked())
    assert list(failed(written)) == ["plain generate"]
    assert "the first token of qasper/qasper-0 differs by a logit of" in written["sentence"]
    assert "; and 3 more, more than rounding" in written["sentence"]


def test_a_method_that_drops_something_of_a_full_budget_is_named(
    checked: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = H2O.compress

    def stingy(self: H2O, layer: PrefillLayer, allowance: Allowance) -> Entries:
        fewer = allowance.n_keep - (allowance.n_keep >= layer.length)
        return honest(self, layer, replace(allowance, n_keep=fewer))

    monkeypatch.setattr(H2O, "compress", stingy)
    monkeypatch.setattr(H2O, "acts_on_decode", True)  # it is asked even where all may stay
    found = failed(verdict_of(checked("benchmark.tasks=[trec]")))
    assert found["no silent no-op"].startswith(
        "H2O@1 on longbench/trec/trec-0: layer 0: attention reads"
    )


def test_another_chat_wrap_is_named_with_both_texts(command: Callable[..., Output]) -> None:
    given = ("experiment=selfcheck", "model=tiny-random", "benchmark=mini", "limit=1")
    output = command(*given, "benchmark.tasks=[passkey]", "model.chat='[INST]{prompt}[/INST]'")
    assert output.status == 2
    assert "error: Stop: golden prompts: text 0 becomes '<s>[INST]Who built" in output.err
    assert "where '<s>user: Who built the bridge?" in output.err
    assert "[/INST]" in output.out  # brackets are no markup


def test_another_tokenizer_is_named(checked: Tiny) -> None:
    found = failed(verdict_of(checked("model.name=smollm2-135m", "benchmark.tasks=[trec]")))
    assert list(found) == ["golden prompts"]


# --- ties


def answer(tokens: list[int], *logits: list[float]) -> Answer:
    return Answer(tokens, torch.tensor(logits))


def a_prompt(stop_ids: frozenset[int] = frozenset()) -> Prompt:
    return Prompt("t/0", "b/t/0", TASKS[0], torch.tensor([[1, 2]]), stop_ids)


PLAIN = answer([0, 1], [5.0, 4.9], [1.0, 2.0])


def looked_at(plain: Answer, full: Answer, stop_ids: frozenset[int] = frozenset()) -> Check:
    check = PlainTokens(2)
    check.see(a_prompt(stop_ids), plain, full, allowed=0.2)
    return check.check()


def test_the_same_tokens_pass() -> None:
    assert looked_at(PLAIN, PLAIN).found == "the same tokens"


def test_tokens_that_part_within_rounding_are_a_tie_and_what_follows_is_not_compared() -> None:
    check = looked_at(PLAIN, answer([1, 0], [4.9, 5.0], [2.0, 1.0]))
    assert check.status is Status.PASSED
    assert check.found.endswith(
        "a tie within rounding: the first token of t/0 differs by a logit of 0.1"
    )


def test_tokens_that_part_by_more_fail() -> None:
    check = looked_at(PLAIN, answer([0, 0], [5.0, 4.9], [2.0, 1.0]))
    assert (check.status, check.found) == (
        Status.FAILED,
        "token 2 of t/0 differs by a logit of 1, more than rounding",
    )


def test_nothing_is_compared_after_the_answers_end() -> None:
    other = answer([0, 0], [5.0, 4.9], [2.0, 1.0])
    assert looked_at(PLAIN, other, stop_ids=frozenset({0})).status is Status.PASSED


@pytest.mark.parametrize(("dtype", "share"), [("float32", 2**-18), ("bfloat16", 2**-7)])
def test_rounding_grows_with_depth_and_the_logits(checked: Tiny, dtype: str, share: float) -> None:
    settings = checked(f"model.dtype={dtype}")
    model = tiny_models.shared_model()
    assert tiny_models.LAYERS == 2
    assert rounding(settings, model, torch.tensor([3.0, -8.0])) == 8 * share


def test_a_cell_with_another_first_token_is_named() -> None:
    check = Compression()
    check.see(a_prompt(), parse_cell("h2o@0.5"), PLAIN, answer([1, 1], [5, 4.9], [9, 2]), 0.2)
    assert check.check().found.startswith("the first token of h2o@0.5 is not the full cache's on t/0")


# --- the sentence


def test_the_sentence_says_all_that_failed_and_nothing_else() -> None:
    checks = [
        Check("a", "", Status.PASSED, "well"),
        Check("b", "", Status.FAILED, "ill"),
        Check("c", "", Status.NOT_APPLICABLE, "nothing there"),
        Check("d", "", Status.FAILED, "worse"),
    ]
    assert Verdict(checks).sentence == "Stop: b: ill; d: worse."
    assert Verdict(checks[::2]).sentence == "Go: a passed. Not told: c (nothing there)."
    assert not Verdict(checks).go


# --- settings


def test_the_tasks_are_those_named_or_those_of_the_benchmark() -> None:
    def tasks(*overrides: str) -> list[str]:
        settings = samples_run(compose("experiment=selfcheck", *overrides))
        assert set(settings.resolved["benchmark"]["tasks"]) == {
            t.name for t in settings.benchmark.tasks
        }
        return [task.name for task in settings.benchmark.tasks]

    assert tasks("model=llama2-7b-chat") == ["multifieldqa_en", "trec", "triviaqa"]
    assert tasks("benchmark.tasks=[lcc,qasper]") == ["qasper", "lcc"]
    assert tasks("benchmark=mini") == ["passkey", "passage_qa", "classification"]
    assert tasks("benchmark=zero_scrolls") == ["gov_report", "summ_screen_fd", "qmsum"]


def test_longbenchs_tasks_are_published_short_and_of_both_wraps() -> None:
    tasks = samples_run(compose("experiment=selfcheck", "model=llama2-7b-chat")).benchmark.tasks
    assert {task.chat for task in tasks} == {True, False}
    assert max(task.max_new_tokens for task in tasks) <= 64


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["experiment=selfcheck", "num_shards=2"], "a selfcheck is one process"),
        (["experiment=selfcheck", "cells=[h2o@0.5]"], "add full@1 to the cells"),
        (["kind=selfcheck"], "experiment=selfcheck has them"),
        (["kind=selfchek"], "kind='selfchek' must be comparison, selfcheck, observations or noise."),
        (
            ["experiment=selfcheck", "selfcheck.tokens=1"],
            "selfcheck.tokens=1 must be a whole number of 2",
        ),
    ],
)
def test_what_cannot_be_checked_is_refused(given: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        samples_run(compose(*given))


def test_a_plan_writes_nothing(command: Callable[..., Output], tmp_path: Path) -> None:
    output = command(
        "experiment=selfcheck", "model=tiny-random", "benchmark=mini", "limit=1", "dry_run=true"
    )
    assert output.status == 0
    assert "answered by plain generate and by every cell, 8 tokens each" in output.out
    assert list((tmp_path / "cwd").iterdir()) == []


def test_go_is_status_0_and_the_last_line(command: Callable[..., Output], tmp_path: Path) -> None:
    output = command("experiment=selfcheck", "model=tiny-random", "benchmark=mini", "limit=1")
    assert output.status == 0, output.err
    assert output.out.splitlines()[-1].startswith("Go: golden prompts, plain generate, budgets,")
    folder = tmp_path / "cwd" / "results" / "runs" / "selfcheck" / "mini" / "tiny-random"
    assert {path.name for path in folder.iterdir()} == {"selfcheck.json", "selfcheck.md", "run"}


def test_no_pace_is_told_of_a_run_without_times() -> None:
    class Empty:
        info = {"cells": ["full@1"], "tasks": {"t": {"samples": 3}}, "runs": []}  # noqa: RUF012

        def records(self, task: str, cell: str) -> list[None]:
            return []

    assert whole_tasks(Empty()) == ""  # type: ignore[arg-type]


# --- golden prompts


def test_every_model_has_golden_prompts() -> None:
    path = Path(harness.selfcheck.__file__).with_name("golden_prompts.json")
    golden = json.loads(path.read_text(encoding="utf-8"))
    assert sorted(golden["ids"]) == shipped_models()
    assert {len(ids) for ids in golden["ids"].values()} == {len(golden["prompts"])}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_models_tokenizer_makes_its_golden_prompts(name: str) -> None:
    tokenizer = load_tokenizer(tokenizer_folder(name))
    check, made = golden_prompts(compose(f"model={name}"), tokenizer)
    assert check.status is Status.PASSED, check.found
    assert tokenizer.decode(made[0]).replace("<s> ", "<s>") == GOLDEN[name]
    other = compose(f"model={name}", "model.chat='[INST] {prompt} [/INST]'")
    assert golden_prompts(other, tokenizer)[0].status is Status.FAILED


# --- a model that is not the published one


def test_random_weights_with_the_real_tokenizer_are_stopped_by_the_published_band(
    tmp_path: Path,
) -> None:
    tokenizer, rows = tokenizer_folder("llama2-7b-chat"), shared("longbench")
    config = LlamaConfig(**tiny_models.SETTINGS | {"vocab_size": 32000, "num_key_value_heads": 4})
    config.max_position_embeddings = 4096
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    for path in tokenizer.iterdir():
        shutil.copy(path, tmp_path / "model")
    settings = compose(
        "experiment=selfcheck",
        "model=llama2-7b-chat",
        f"model.path={tmp_path / 'model'}",
        f"benchmark.data_dir={rows}",
        "cells=[full@1,kvmerger@0.5,h2o@0.5]",
        f"output_dir={tmp_path / 'out'}",
        "limit=7",
    )
    written = verdict_of(settings)
    assert written["verdict"] == "stop"
    assert list(failed(written)) == ["published scores"]
    assert "triviaqa 0.00 (published 77.8 ± 2) is excluded by 7 samples" in written["sentence"]
    by_name = {each["name"]: each["status"] for each in written["checks"]}
    assert by_name["golden prompts"] == "passed"
    assert by_name["plain generate"] == "passed"
