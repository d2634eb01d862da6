from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from harness.report import published
from harness.report.published import Reference, Source, for_benchmark, load_references, members
from kvmerge.errors import UserError

REFERENCES = load_references()


def find(method: str, task: str, budget: str, model: str = "llama2-7b-chat") -> list[Reference]:
    return [
        r for r in REFERENCES if (r.method, r.task, r.budget, r.model) == (method, task, budget, model)
    ]


def test_every_published_number_is_there_and_none_was_invented() -> None:
    counts = Counter(
        (str(r.source), r.method.split(":")[0], r.benchmark) for r in REFERENCES if r.published
    )
    assert counts == {
        ("official", "full", "longbench"): 21 + 6 + 2,  # tasks, categories, averages
        ("secondary", "full", "longbench"): 3 + 1,  # tasks; the Mistral average
        ("secondary", "kvmerger", "longbench"): 10 + 2,
        ("secondary", "h2o", "longbench"): 10 + 2,
        ("secondary", "cam", "longbench"): 1,
        ("secondary", "full", "zero_scrolls"): 1,
        ("secondary", "kvmerger", "zero_scrolls"): 2,
        ("secondary", "h2o", "zero_scrolls"): 2,
        ("secondary", "cam", "zero_scrolls"): 1,
        ("review", "full", "longbench"): 1,  # Mistral on NarrativeQA
        ("review", "kvmerger", "longbench"): 1 + 2,  # the same; ablations over five unnamed tasks
        (
            "review",
            "h2o",
            "longbench",
        ): 2,  # NarrativeQA and the average, again
    }


@pytest.mark.parametrize(
    ("method", "task", "budget", "published"),
    [
        ("full", "lcc", "1", ["52.4"]),
        ("full", "passage_retrieval_zh", "1", ["0.5"]),
        ("full", "repobench-p", "1", ["43.8"]),
        ("full", "2wikimqa", "1", ["31.45", "32.8"]),
        ("full", "triviaqa", "1", ["83.09", "77.8"]),
        ("full", "qasper", "1", ["", "19.2"]),
        ("kvmerger", "passage_retrieval_en", "0.5", ["7.33"]),
        ("kvmerger", "trec", "0.5", ["64.00"]),
        ("h2o", "narrativeqa", "0.5", ["17.85", "17.48"]),
        ("h2o", "average", "0.35", ["13.49"]),
        ("cam", "average", "0.35", [""]),
    ],
)
def test_numbers_are_as_printed(method: str, task: str, budget: str, published: list[str]) -> None:
    assert [r.published for r in find(method, task, budget)] == published


def test_the_two_sources_disagreement_on_h2o_is_kept() -> None:
    found = [r for r in find("h2o", "average", "0.5") if r.benchmark == "longbench"]
    assert [(r.score, str(r.source)) for r in found] == [(33.49, "secondary"), (34.0, "review")]


def test_mistrals_narrativeqa_is_quoted_in_a_review() -> None:
    found = [
        *find("full", "narrativeqa", "1", "mistral-7b-instruct"),
        *find("kvmerger", "narrativeqa", "0.35", "mistral-7b-instruct"),
    ]
    assert [(r.benchmark, r.published, r.source, r.text) for r in found] == [
        ("longbench", "21.96", Source.REVIEW, "21.96‡"),
        ("longbench", "23.58", Source.REVIEW, "23.58‡"),
    ]


def test_a_number_of_no_known_budget_is_named_by_its_method() -> None:
    ablation = next(r for r in REFERENCES if r.method == "kvmerger:pivot=random")
    assert (ablation.cell, ablation.source) == ("kvmerger:pivot=random", Source.REVIEW)


def test_mistral_h2o_carries_its_warning() -> None:
    (found,) = find("h2o", "average", "0.35", "mistral-7b-instruct")
    assert found.score == 13.48
    assert "fault" in found.note


def plain_mean(aggregate: Reference) -> float:
    """The mean of an aggregate's members among the published numbers of its source."""

    def source(r: Reference) -> tuple[str, ...]:
        return (r.provenance, r.benchmark, r.model, r.budget, r.method)

    scores: dict[str, float] = {}
    for r in REFERENCES:
        if source(r) == source(aggregate) and r.score is not None:
            scores.setdefault(r.task, r.score)
    return sum(scores[member] for member in aggregate.over) / len(aggregate.over)


@pytest.mark.parametrize(
    "reference",
    [r for r in REFERENCES if r.over and r.published and r.source is not Source.REVIEW],
    ids=lambda r: f"{r.method}-{r.task}",
)
def test_aggregates_agree_with_their_members(reference: Reference) -> None:
    mean = plain_mean(reference)
    # Members are rounded to one decimal in the official table, which leaves up to 0.07.
    assert mean == pytest.approx(reference.score, abs=0.075)


def test_kvmerger_average_is_over_nine_tasks() -> None:
    (found,) = [r for r in find("kvmerger", "average", "0.5") if r.benchmark == "longbench"]
    assert len(found.over) == 9
    assert plain_mean(found) == pytest.approx(34.997, abs=5e-4)


def test_a_benchmark_prefers_its_own_model_and_official_numbers() -> None:
    llama = for_benchmark(REFERENCES, "longbench", "llama2-7b-chat")
    assert {r.model for r in llama} == {"llama2-7b-chat"}
    order = [str(r.source) for r in llama]
    assert list(dict.fromkeys(order)) == ["official", "review", "secondary"]
    assert order == sorted(order)
    other = for_benchmark(REFERENCES, "longbench", "smollm2-135m")
    assert {r.model for r in other} == {"llama2-7b-chat", "mistral-7b-instruct", ""}
    assert for_benchmark(REFERENCES, "mini", "smollm2-135m") == []


@pytest.mark.parametrize(
    ("model", "fits"),
    [
        ("mistral-7b-instruct", True),
        ("mistral-7b-instruct-v0.1", True),
        ("mistral-7b-instruct-v0.2", True),
        ("mistral-7b-instruct-vicuna", False),
        ("mistral-7b-instruct-v0.2-tuned", False),
        ("my-mistral-7b-instruct", False),
        ("mistral-7b", False),
    ],
)
def test_a_source_that_states_no_version_fits_every_one(model: str, fits: bool) -> None:
    (found,) = find("full", "average", "1", "mistral-7b-instruct")
    assert found.fits(model) is fits
    named = {r.model for r in for_benchmark(REFERENCES, "longbench", model)}
    assert (named == {"mistral-7b-instruct"}) is fits  # without a fit all models are shown


def test_members_are_followed_to_the_tasks() -> None:
    over = {"all": ("first", "c"), "first": ("a", "b")}
    assert members("all", over) == {"a", "b", "c"}
    assert members("a", over) == {"a"}


def test_a_folder_without_published_numbers_is_an_error_not_a_run_without_gates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="holds no published numbers"):
        load_references(tmp_path / "none")
    monkeypatch.setattr(published, "_PACKAGE", tmp_path / "harness" / "report")
    with pytest.raises(UserError, match="published numbers are missing"):
        published.folder()


HEADER = "benchmark,model,method,budget,task,score,samples,tolerance,over,source,provenance,note\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("benchmark,score\n", "must have the columns"),
        (HEADER + "b,m,full,1,t,high,,,,official,p,\n", "line 2: could not convert"),
        (
            HEADER + "b,m,full,1,t,1,,,,X,p,\n",
            "line 2: source must be one of official, figure",
        ),
        (HEADER + "b,m,full,1,t,1,,,,official,,\n", "provenance not empty"),
        (HEADER + "b,m,full,1,t,1,,,,official,p\n", "12 columns"),
        (HEADER + "b,m,full,1,t,1,,,,official,p,note, with a comma\n", "12 columns"),
        (HEADER + "b,m,full,1,t,1,many,,,official,p,\n", "line 2: invalid literal for int"),
        (HEADER + "b,m,full,1,t,1,5,wide,,official,p,\n", "line 2: could not convert"),
        (HEADER + "b,m,full,1,t,1,5,0,,official,p,\n", "a tolerance must be above 0"),
        (HEADER + "b,m,full,1,t,1,5,inf,,official,p,\n", "a tolerance must be above 0"),
        (HEADER + "b,m,full,1,t,1,,2,,official,p,\n", "and needs score and samples"),
        (HEADER + "b,m,full,1,t,,5,2,,official,p,\n", "and needs score and samples"),
        (HEADER + "b,m,full,1,t,1,5,2,,review,p,\n", "a review source cannot carry a tolerance"),
    ],
)
def test_a_bad_file_is_refused_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        load_references(tmp_path)
