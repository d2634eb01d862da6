"""Runs whose question comes after the compression: what is recorded, shared, resumed and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import harness.runner
import kvmerge.engine
from benchmarks.needle.benchmark import Needle
from benchmarks.task import Sample
from harness.answering import Job, context_hash, prompt_hash, shared_context
from harness.executors.units import Outcome
from harness.results import Results
from harness.runner import left, run
from harness.runner import write as write_down
from harness.settings import Settings
from kvmerge.errors import UserError
from tests.tiny_run import compose, read_lines, row, tiny_settings, write_rows

Tiny = Callable[..., Settings]
AFTER = "question=after"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Two contexts with two questions each, in turn."""
    contexts = [row("qasper", number)["context"] for number in (1, 2)]
    asked = [
        row("qasper", 2 * place + number, context=contexts[number])
        for place in range(2)
        for number in range(2)
    ]
    return write_rows(tmp_path / "rows", {"qasper": asked, "lcc": [row("lcc", n) for n in range(2)]})


@pytest.fixture
def tiny(checkpoint: Path, rows: Path, tmp_path: Path) -> Tiny:
    def settings(*overrides: str, folder: str = "out") -> Settings:
        given = {text.partition("=")[0] for text in overrides}
        tasks = [] if "benchmark.tasks" in given else ["benchmark.tasks=[qasper]"]
        return tiny_settings(checkpoint, rows, tmp_path / folder, *tasks, *overrides)

    return settings


@pytest.fixture
def prefills(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each prefill."""
    seen: list[int] = []
    honest = kvmerge.engine.Comparison.prefill

    def counted(self, input_ids, capacity):  # type: ignore[no-untyped-def]
        seen.append(input_ids.shape[1])
        return honest(self, input_ids, capacity)

    monkeypatch.setattr(kvmerge.engine.Comparison, "prefill", counted)
    return seen


def test_records_give_context_question_and_kept_entries_apart(tiny: Tiny, checkpoint: Path) -> None:
    settings = tiny(AFTER)
    run(settings)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    (task,) = settings.benchmark.tasks
    for (_, cell, _, name), line in read_lines(settings.output_dir).items():
        (sample,) = (each for each in settings.benchmark.samples(task) if each.id == name)
        ids = settings.benchmark.encode(sample, task, tokenizer, settings.prompt_format).prompt
        assert line["prompt_hash"] == prompt_hash(ids)
        assert line["prompt_tokens"] == len(ids) == line["context_tokens"] + line["question_tokens"]
        asked = tokenizer.decode(ids[line["context_tokens"] :])
        assert asked.strip().startswith("Answer the question based on the above article")
        share = float(cell.rpartition("@")[2])
        assert line["kept_entries"] == int(share * line["context_tokens"])
        assert line["budget_achieved"] == line["kept_entries"] / line["context_tokens"]
        assert line["fidelity_tokens"] == min(line["generated_tokens"], line["fidelity_tokens"])


def test_a_question_inside_is_no_part_of_its_own(tiny: Tiny) -> None:
    settings = tiny()
    run(settings)
    for line in read_lines(settings.output_dir).values():
        assert (line["context_tokens"], line["question_tokens"]) == (line["prompt_tokens"], 0)


@pytest.mark.parametrize("question", ["inside", "after"])
def test_a_record_names_the_context_that_samples_share(tiny: Tiny, question: str) -> None:
    settings = tiny(f"question={question}", "cells=[full@1]", "benchmark.tasks=[qasper,lcc]")
    run(settings)
    contexts = {
        name: line["context_hash"] for (*_, name), line in read_lines(settings.output_dir).items()
    }
    assert contexts["qasper-0"] == contexts["qasper-2"] != contexts["qasper-1"] == contexts["qasper-3"]
    assert len({contexts[f"lcc-{number}"] for number in range(2)}) == 2


def test_the_question_is_no_part_of_the_digest_and_a_sample_without_one_has_none() -> None:
    def sample(prompt: str, question: str | None) -> Sample:
        return Sample("a", "t", prompt, question=question, answers=())

    assert context_hash(sample("Read: long. Who?\n", "Who?")) == context_hash(
        sample("Read: long. When?", "When?")
    )
    assert context_hash(sample("Read: long.", None)) is None


def test_needles_share_no_context_before_their_text_is_filled_in() -> None:
    needles = Needle(tasks=["number"], lengths=[512], depths=[0, 50], repeats=1)
    (task,) = needles.tasks
    samples = needles.samples(task)
    assert [context_hash(each) for each in samples] == [None, None]
    jobs = [Job(task, each, ()) for each in samples]
    assert shared_context(jobs[0]) != shared_context(jobs[1])


def test_questions_of_one_context_share_a_prefill_of_the_context_alone(
    tiny: Tiny, prefills: list[int]
) -> None:
    settings = tiny(AFTER, "batch_size=1")
    run(settings)
    lines = read_lines(settings.output_dir)
    lengths = {line["prompt_hash"]: line["context_tokens"] for line in lines.values()}
    assert len(lengths) == 4
    assert sorted(prefills) == sorted(lengths.values())[::2]


def test_samples_are_answered_in_order_where_nothing_is_shared(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered: dict[str, list[str]] = {}
    for question in ("inside", "after"):
        settings = tiny(f"question={question}", "cells=[full@1]", folder=question)
        noted = answered.setdefault(question, [])

        def write(results: Results, outcome: Outcome, noted: list[str] = noted) -> None:
            noted.append(outcome.id)
            write_down(results, outcome)

        with monkeypatch.context() as patched:
            patched.setattr(harness.runner, "write", write)
            run(settings)
        path = settings.output_dir / "predictions" / "qasper" / "full@1.jsonl"
        written = [json.loads(line)["id"] for line in path.read_text().splitlines()]
        assert written == [f"qasper-{number}" for number in range(4)], "in the benchmark's order"
    assert answered["inside"] == [f"qasper-{number}" for number in range(4)]
    assert answered["after"] == [f"qasper-{number}" for number in (0, 2, 1, 3)]


def test_which_questions_come_together_changes_no_line(tiny: Tiny) -> None:
    """Draws are a context's, not a sample's, and a killed run may have had some of its questions."""
    whole = tiny(AFTER, folder="whole")
    run(whole)
    parts = [tiny(AFTER, f"limit={limit}", "batch_size=1", folder="parts") for limit in (1, 3)]
    for settings in [*parts, tiny(AFTER, folder="parts")]:
        run(settings)
    assert read_lines(parts[0].output_dir) == read_lines(whole.output_dir)


def test_answers_of_one_token_differ_between_cells(tiny: Tiny) -> None:
    """Where the question is inside, the first token is the full cache's in every cell."""
    cells = "cells=[full@1,h2o@0.2,streaming_llm@0.1,tova@0.05]"
    firsts = {}
    for question in ("inside", "after"):
        settings = tiny(f"question={question}", cells, folder=question)
        object.__setattr__(settings.benchmark.tasks[0], "max_new_tokens", 1)
        run(settings)
        lines = read_lines(settings.output_dir)
        by_sample: dict[str, set[str]] = {}
        for (_, _, _, name), line in lines.items():
            by_sample.setdefault(name, set()).add(line["prediction"])
        firsts[question] = max(map(len, by_sample.values()))
        kl = [line["kl_to_full"] for key, line in lines.items() if key[1] != "full@1"]
        assert all(each is None for each in kl) == (question == "inside")
    assert firsts["inside"] == 1
    assert firsts["after"] > 1


def test_results_of_the_two_are_never_mixed(tiny: Tiny) -> None:
    run(tiny("limit=1"))
    with pytest.raises(UserError, match=r"another question: 'inside' then, 'after' now"):
        run(tiny(AFTER, "limit=1"))


def test_a_task_without_a_question_is_named_with_those_that_have_one(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "benchmarks.longbench.benchmark.after_context",
        lambda text, fields: None if "code" in text else "Answer",
    )
    settings = tiny(AFTER, "benchmark.tasks=[qasper,lcc]")
    for ask in (left, run):
        with pytest.raises(UserError, match=r"lcc of longbench has no question.*tasks=\[qasper\]"):
            ask(settings)


@pytest.mark.parametrize(
    "words",
    [
        (AFTER, "decode_policy=hold", "cells=[h2o@0.5]"),
        (AFTER, "cells=[full@1,h2o_sim_decode@0.5]"),
    ],
    ids=["hold", "simulated"],
)
def test_cells_that_would_drop_parts_of_the_question_are_refused(
    tiny: Tiny, words: tuple[str, ...]
) -> None:
    with pytest.raises(UserError, match=r"question=after stores the question whole, and h2o"):
        tiny(*words)


def test_a_perplexity_has_no_question(checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The river was high in spring. " * 200)
    settings = compose(
        AFTER,
        "benchmark=perplexity",
        f"benchmark.source={text}",
        f"model.path={checkpoint}",
        f"output_dir={tmp_path / 'out'}",
        "cells=[full@1]",
    )
    with pytest.raises(UserError, match="has no question after its context"):
        left(settings)
