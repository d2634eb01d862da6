"""Metrics against recorded outputs of the official scorer."""

import builtins
import json
import os
import subprocess
import sys
from difflib import SequenceMatcher
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import longbench
from benchmarks.longbench.metrics import METRICS, code_sim, rouge_l, rouge_zh
from benchmarks.task import Task

BY_NAME = {metric.name: metric for metric in METRICS}
RECORDED = json.loads(Path(__file__).with_name("longbench_scores.json").read_text("utf-8"))


def check(vector, function):
    if "raises" in vector:
        with pytest.raises(getattr(builtins, vector["raises"])):
            function()
    else:
        result = function()
        assert type(result) is float
        assert result == vector["score"]


@pytest.mark.parametrize("vector", RECORDED["metrics"], ids=lambda v: v["metric"])
def test_a_metric_gives_what_the_official_one_gave(vector):
    metric = BY_NAME[vector["metric"]]
    check(
        vector,
        lambda: metric.sample(vector["prediction"], [vector["answer"]], vector.get("all_classes"))[
            "score"
        ],
    )


@pytest.mark.parametrize("vector", RECORDED["scores"], ids=lambda v: v["dataset"])
def test_a_score_is_what_the_official_scorer_gave(vector):
    check(
        vector,
        lambda: longbench.score(
            vector["dataset"], vector["prediction"], vector["answers"], vector["all_classes"]
        ),
    )


def test_every_metric_is_held_to_official_values():
    assert {vector["metric"] for vector in RECORDED["metrics"]} == set(BY_NAME)


def words(n):
    return " ".join(map(str, range(n)))


def deep(depth, function):
    return function() if depth == 0 else deep(depth - 1, function)


def test_rouge_overflow_scores_zero_at_any_stack_depth():
    short, long = words(900), words(1100)
    assert deep(300, lambda: rouge_l(short, short)) == pytest.approx(1)
    assert rouge_l(long, long) == 0
    assert rouge_zh(long, long) == 0


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="frames count differently elsewhere")
def test_rouge_overflows_where_official_eval_does():
    # Official eval.py run as a script, Python 3.11: 990 words are the most that score (989 through
    # jieba). A process of its own, because test tools change the recursion limit.
    code = (
        "from benchmarks.longbench.metrics import rouge_l, rouge_zh\n"
        "for metric, most in ((rouge_l, 990), (rouge_zh, 989)):\n"
        "    texts = ['\\n'.join(map(str, range(n))) for n in (most, most + 1)]\n"
        "    print([metric(text, text) > 0 for text in texts])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == "[True, False]\n[True, False]\n"
    assert result.stderr == ""  # jieba loads silently


@given(st.text("ab =()", min_size=1), st.text("ab =()", min_size=1))
def test_code_sim_is_fuzzywuzzy_with_difflib(prediction, answer):
    """`fuzz.ratio` in its own words: the rounded percentage of difflib, whatever is installed."""
    percent = round(100 * SequenceMatcher(None, prediction, answer).ratio())
    assert code_sim(prediction, answer) == percent / 100


@settings(deadline=None)  # jieba takes half a second to load
@given(st.sampled_from(sorted(BY_NAME)), st.text(), st.text(), st.lists(st.text(max_size=3)))
def test_scores_stay_in_range(name, prediction, answer, labels):
    if name.startswith("retrieval"):
        answer = f"Paragraph 1 段落1 {answer}"
    assert 0 <= BY_NAME[name].sample(prediction, [answer], labels)["score"] <= 1


def test_score_is_the_best_over_answers_and_zero_without():
    task = Task("t", BY_NAME["qa_f1"], 8)
    assert task.mark("red blue", ["green", "red", "blue sky red"])["score"] == 0.8
    assert task.mark("red", [])["score"] == 0


def test_where_the_rule_is_set_only_the_first_line_is_scored():
    plain, first = Task("t", BY_NAME["qa_f1"], 8), Task("t", BY_NAME["qa_f1"], 8, first_line=True)
    assert plain.mark("\nred\nblue", ["red"])["score"] == pytest.approx(2 / 3)
    assert first.mark("\nred\nblue", ["red"])["score"] == 1


CODE = (
    "import json, sys, warnings\n"
    "warnings.simplefilter('error')\n"
    "import Levenshtein\n"
    "from benchmarks.longbench.metrics import code_sim\n"
    "pairs = json.load(sys.stdin)\n"
    "scores = [code_sim(prediction, answer) for prediction, answer in pairs]\n"
    "from fuzzywuzzy import StringMatcher\n"
    "others = [round(100 * StringMatcher.StringMatcher(None, p, a).ratio()) / 100 for p, a in pairs]\n"
    "json.dump([scores, others], sys.stdout)\n"
)


def test_code_similarity_is_difflibs_with_python_levenshtein_installed_too(tmp_path):
    """In a second environment, which has the package whose matcher gives other scores."""
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    target = ["--target", str(tmp_path), "python-Levenshtein==0.27.1"]
    done = subprocess.run([*install, *target], capture_output=True, text=True, timeout=120)
    if done.returncode:
        pytest.skip(f"the package registry does not give python-Levenshtein: {done.stderr[-200:]}")
    vectors = [v for v in RECORDED["metrics"] if v["metric"] == "code_sim"]
    pairs = [[v["prediction"], v["answer"]] for v in vectors]
    pairs.append(["def read(path):", "return open(path)"])
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-c", CODE],
        input=json.dumps(pairs),
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    scores, others = json.loads(ran.stdout)
    assert scores == [code_sim(prediction, answer) for prediction, answer in pairs]
    assert scores != others, "the other matcher must differ, or this shows nothing"
