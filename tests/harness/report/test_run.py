from __future__ import annotations

import json
import math
import random
import shutil
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from benchmarks.metrics import find_metric
from harness.records import prediction_path
from harness.report.bootstrap import RESAMPLES, aggregate, score_task
from harness.report.run import averages, differences, load_run
from harness.report.summary import summarise, write_summary
from kvmerge.errors import UserError
from tests.synthetic_run import record, write_run

CONTRACT = [
    "model",
    "method",
    "budget",
    "benchmark",
    "task",
    "metric",
    "n",
    "score",
    "ci_low",
    "ci_high",
    "budget_achieved_mean",
    "budget_achieved_min",
    "budget_achieved_max",
    "kv_bytes",
    "kv_bytes_full",
    "kl_to_full",
    "top1_agreement",
]


def records(scores: list[float], **fields: float) -> list:
    return [record(str(i), score, **fields) for i, score in enumerate(scores)]


def percentile_interval(draw: list[float]) -> tuple[float, float]:
    """2.5th and 97.5th percentile with linear interpolation, spelled out."""
    ordered = sorted(draw)
    bounds = []
    for q in (0.025, 0.975):
        place = q * (len(ordered) - 1)
        below = math.floor(place)
        above = min(below + 1, len(ordered) - 1)
        bounds.append(ordered[below] + (place - below) * (ordered[above] - ordered[below]))
    return bounds[0], bounds[1]


def test_one_line_a_cell_and_task_in_the_contracts_columns(tmp_path: Path) -> None:
    write_run(
        tmp_path,
        {"trec": "classification", "qasper": "qa_f1"},
        {
            "full@1": {"trec": records([1.0, 0.0]), "qasper": records([0.5])},
            "kvmerger:sigma=3@0.35": {"trec": records([0.0, 0.0])},
        },
    )
    write_summary(load_run(tmp_path))
    frame = pd.read_csv(tmp_path / "summary.csv", dtype={"budget": str})
    assert list(frame.columns[: len(CONTRACT)]) == CONTRACT
    assert frame[["method", "budget", "task"]].to_numpy().tolist() == [
        ["full", "1", "trec"],
        ["full", "1", "qasper"],
        ["kvmerger:sigma=3", "0.35", "trec"],
    ]
    assert frame["score"].tolist() == [50.0, 50.0, 0.0]
    assert frame["n"].tolist() == [2, 1, 2]
    assert set(frame["model"]) == {"toy-1m"}
    assert set(frame["benchmark"]) == {"toy"}
    assert frame["metric"].tolist() == ["classification", "qa_f1", "classification"]


def test_values_without_meaning_are_empty_not_zero(tmp_path: Path) -> None:
    write_run(tmp_path, {"t": "qa_f1"}, {"full@1": {"t": records([0.5])}})
    write_summary(load_run(tmp_path))
    text = (tmp_path / "summary.csv").read_text()
    row = dict(zip(*(line.split(",") for line in text.splitlines()), strict=True))
    for name in ("ci_low", "ci_high", "kl_to_full", "top1_agreement", "size_bytes"):
        assert row[name] == "", name
    assert row["fidelity_n"] == "0"
    assert row["kv_bytes"] == "1000"


def test_means_are_over_seeds_first_then_samples(tmp_path: Path) -> None:
    lines = [
        record("a", 1.0, seed=1, kv_bytes=10, budget_achieved=0.1, kl_to_full=1.0),
        record("a", 0.0, seed=2, kv_bytes=30, budget_achieved=0.3, kl_to_full=3.0),
        record("a", 0.0, seed=3, kv_bytes=20, budget_achieved=0.5),
        record("b", 1.0, seed=1, kv_bytes=100, budget_achieved=0.2, kl_to_full=10.0),
        record("c", 1.0, seed=1, kv_bytes=60, budget_achieved=0.4),
    ]
    write_run(tmp_path, {"t": "qa_f1"}, {"h2o@0.5": {"t": lines}})
    (row,) = summarise(load_run(tmp_path)).to_dict("records")
    assert row["n"] == 3
    assert row["score"] == pytest.approx(100 * (1 / 3 + 1 + 1) / 3)
    assert row["kv_bytes"] == pytest.approx((20 + 100 + 60) / 3)
    assert row["budget_achieved_mean"] == pytest.approx((0.3 + 0.2 + 0.4) / 3)
    assert (row["budget_achieved_min"], row["budget_achieved_max"]) == (0.1, 0.5)
    assert row["kl_to_full"] == pytest.approx((2.0 + 10.0) / 2)
    assert row["fidelity_n"] == 2
    assert row["kept_entries_mean"] == 50.0
    assert math.isnan(row["kept_entries_min"])


def test_interval_is_the_percentile_bootstrap_over_samples(tmp_path: Path) -> None:
    rng = random.Random(1)
    scores = [rng.random() ** 2 for _ in range(40)]
    write_run(tmp_path, {"t": "qa_f1"}, {"h2o@0.5": {"t": records(scores)}})
    (row,) = summarise(load_run(tmp_path)).to_dict("records")
    draws = [100 * sum(rng.choices(scores, k=40)) / 40 for _ in range(10_000)]
    low, high = percentile_interval(draws)
    by_scipy = stats.bootstrap(
        (np.array(scores) * 100,), np.mean, n_resamples=10_000, method="percentile", rng=7
    ).confidence_interval
    # The Monte Carlo error of such a bound is about 0.1 here; a standard error instead of an
    # interval, or one over 90%, would be off by 1 or more.
    assert row["ci_low"] == pytest.approx(low, abs=0.4)
    assert row["ci_high"] == pytest.approx(high, abs=0.4)
    assert row["ci_low"] == pytest.approx(by_scipy.low, abs=0.4)
    assert row["ci_high"] == pytest.approx(by_scipy.high, abs=0.4)


def test_summary_does_not_depend_on_the_order_of_lines(tmp_path: Path) -> None:
    lines = records([0.1, 0.9, 0.4, 0.3, 0.8])
    tasks = {"t": "qa_f1"}
    write_run(tmp_path / "a", tasks, {"h2o@0.5": {"t": lines}})
    write_run(tmp_path / "b", tasks, {"h2o@0.5": {"t": lines[::-1]}})
    texts = []
    for name in "ab":
        write_summary(load_run(tmp_path / name))
        texts.append((tmp_path / name / "summary.csv").read_text())
    assert texts[0] == texts[1]


def test_the_number_of_resamples_is_the_contracts(tmp_path: Path) -> None:
    write_run(tmp_path, {"t": "qa_f1"}, {"h2o@0.5": {"t": records([0.1, 0.9])}})
    assert RESAMPLES == 10_000
    assert load_run(tmp_path).scores["t", "h2o@0.5"].replicates.shape == (10_000,)


def test_perplexity_is_of_the_sums(tmp_path: Path) -> None:
    nll, tokens = [10.0, 3.0, 40.0], [5, 4, 10]
    lines = [
        record(str(i), math.exp(a / b), extra={"nll": a, "tokens": b})
        for i, (a, b) in enumerate(zip(nll, tokens, strict=True))
    ]
    write_run(tmp_path, {"t": "perplexity"}, {"full@1": {"t": lines}})
    (row,) = summarise(load_run(tmp_path)).to_dict("records")
    assert row["score"] == pytest.approx(math.exp(53 / 19))
    rng = random.Random(3)
    draws = []
    for _ in range(10_000):
        picked = rng.choices(range(3), k=3)
        draws.append(math.exp(sum(nll[i] for i in picked) / sum(tokens[i] for i in picked)))
    low, high = percentile_interval(draws)
    assert row["ci_low"] == pytest.approx(low)  # few distinct resamples, so the bounds are exact
    assert row["ci_high"] == pytest.approx(high)


def test_rouge_geometric_mean_is_of_the_averages(tmp_path: Path) -> None:
    # Averages 0.30, 0.08, 0.18: the golden 16.286506 of the protocol. The mean of the samples'
    # own scores would be another number.
    parts = [(0.2, 0.0, 0.06), (0.4, 0.16, 0.3)]
    lines = [
        record(str(i), 0.1, extra={"rouge1": a, "rouge2": b, "rougel": c})
        for i, (a, b, c) in enumerate(parts)
    ]
    write_run(tmp_path, {"t": "rouge_gm"}, {"full@1": {"t": lines}})
    (row,) = summarise(load_run(tmp_path)).to_dict("records")
    assert row["score"] == pytest.approx(16.286506, abs=1e-6)
    # A resample of one sample twice has rouge2 = 0, hence a score of 0.
    assert row["ci_low"] == 0.0


@pytest.mark.parametrize(
    ("metric", "line", "part"),
    [
        ("qa_f1", record("7", math.nan), "score"),
        ("perplexity", record("7", 3.0, extra={"nll": 1.0}), "tokens"),
        (
            "rouge_gm",
            record("7", 0.1, extra={"rouge1": None, "rouge2": 1.0, "rougel": 1.0}),
            "rouge1",
        ),
    ],
)
def test_a_line_without_its_metrics_parts_is_refused(
    tmp_path: Path, metric: str, line, part: str
) -> None:
    write_run(tmp_path, {"t": metric}, {"full@1": {"t": [line]}})
    with pytest.raises(UserError, match=rf"full@1.*sample '7' has no finite '{part}'"):
        summarise(load_run(tmp_path))


def test_a_score_in_percent_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path, {"t": "qa_f1"}, {"full@1": {"t": [record("7", 37.5)]}})
    with pytest.raises(UserError, match=r"sample '7' has 'score' = 37\.5, not 0 to 1"):
        summarise(load_run(tmp_path))


def test_averages_are_plain_means_over_tasks_with_full_coverage(tmp_path: Path) -> None:
    rng = random.Random(5)
    a = [rng.random() for _ in range(20)]
    b = [rng.random() for _ in range(30)]
    perplexity = [record("0", 9.0, extra={"nll": 2.0, "tokens": 1})]
    write_run(
        tmp_path,
        {"a": "qa_f1", "b": "qa_f1", "p": "perplexity"},
        {
            "full@1": {"a": records(a), "b": records(b), "p": perplexity},
            "h2o@0.5": {"a": records(a), "p": perplexity},
        },
    )
    averaged = averages(load_run(tmp_path))
    assert list(averaged) == ["full@1"]  # h2o lacks b; the perplexity is in no average
    assert averaged["full@1"].value == pytest.approx(100 * (sum(a) / 20 + sum(b) / 30) / 2)
    draws = [
        100 * (sum(rng.choices(a, k=20)) / 20 + sum(rng.choices(b, k=30)) / 30) / 2
        for _ in range(10_000)
    ]
    low, high = percentile_interval(draws)
    shown = averaged["full@1"].estimate()
    assert shown.low == pytest.approx(low, abs=0.4)
    assert shown.high == pytest.approx(high, abs=0.4)


def test_tasks_are_resampled_independently(tmp_path: Path) -> None:
    scores = [0.1, 0.5, 0.9, 0.2, 0.7, 0.4]
    write_run(
        tmp_path,
        {"a": "qa_f1", "b": "qa_f1"},
        {"full@1": {"a": records(scores), "b": records(scores)}},
    )
    run = load_run(tmp_path)
    correlation = np.corrcoef(
        run.scores["a", "full@1"].replicates, run.scores["b", "full@1"].replicates
    )[0, 1]
    assert abs(correlation) < 0.05


def test_an_average_over_a_task_of_one_sample_has_no_interval(tmp_path: Path) -> None:
    write_run(
        tmp_path,
        {"a": "qa_f1", "b": "qa_f1"},
        {"full@1": {"a": records([0.2, 0.4]), "b": records([0.5])}},
    )
    shown = averages(load_run(tmp_path))["full@1"].estimate()
    assert shown.value == pytest.approx(40.0)
    assert math.isnan(shown.low)


def test_differences_are_paired_by_sample(tmp_path: Path) -> None:
    rng = random.Random(9)
    full = [rng.random() for _ in range(30)]
    ours = [min(1.0, score + 0.01 + 0.02 * rng.random()) for score in full]
    write_run(
        tmp_path,
        {"t": "qa_f1"},
        {"full@1": {"t": records(full)}, "h2o@0.5": {"t": records(ours)[::-1]}},
    )
    task, mean = differences(load_run(tmp_path), "full@1")
    gaps = [100 * (a - b) for a, b in zip(ours, full, strict=True)]
    assert (task.task, task.cell, task.n) == ("t", "h2o@0.5", 30)
    assert task.scored.value == pytest.approx(sum(gaps) / 30)
    low, high = percentile_interval([sum(rng.choices(gaps, k=30)) / 30 for _ in range(10_000)])
    shown = task.scored.estimate()
    # Unpaired, the interval would be some 30 points wide.
    assert shown.low == pytest.approx(low, abs=0.05)
    assert shown.high == pytest.approx(high, abs=0.05)
    assert (mean.task, mean.scored.value) == ("average", task.scored.value)


def test_differences_use_only_samples_that_both_have(tmp_path: Path) -> None:
    write_run(
        tmp_path,
        {"t": "qa_f1"},
        {
            "full@1": {"t": [record("a", 0.1), record("b", 0.2), record("c", 0.3)]},
            "h2o@0.5": {"t": [record("b", 0.4), record("c", 0.9), record("d", 0.0)]},
        },
    )
    task = differences(load_run(tmp_path), "full@1")[0]
    assert task.n == 2
    assert task.scored.value == pytest.approx(100 * ((0.4 - 0.2) + (0.9 - 0.3)) / 2)
    low, high = task.scored.estimate().low, task.scored.estimate().high
    assert (low, high) == (pytest.approx(20.0), pytest.approx(60.0))


def test_aggregates_average_averages() -> None:
    metric = find_metric("qa_f1")
    run_scores = {
        name: score_task(name, _samples(value), metric)
        for name, value in {"a": 0.1, "b": 0.3, "c": 0.8}.items()
    }
    over = {"ab": ("a", "b"), "all": ("ab", "c"), "lacking": ("ab", "d")}
    found = aggregate("all", run_scores, over)
    assert found is not None
    assert found.value == pytest.approx((20 + 80) / 2)
    assert aggregate("lacking", run_scores, over) is None


def _samples(value: float):
    from harness.report.bootstrap import Samples

    return Samples(("x", "y"), np.array([[value], [value]]))


def test_shards_merge_to_the_same_summary(tmp_path: Path) -> None:
    tasks = {"a": "qa_f1", "b": "qa_f1"}
    lines = records([0.1, 0.5, 0.3, 0.9, 0.7])
    write_run(tmp_path / "whole", tasks, {"full@1": {"a": lines, "b": lines}})
    for k in range(2):
        write_run(
            tmp_path / "split" / "shards" / f"{k}-of-2",
            tasks,
            {"full@1": {"a": lines[k::2], "b": lines[k::2]}},
            shard=k,
            num_shards=2,
        )
    write_summary(load_run(tmp_path / "whole"))
    write_summary(load_run(tmp_path / "split"))
    assert (tmp_path / "split" / "summary.csv").read_text() == (
        tmp_path / "whole" / "summary.csv"
    ).read_text()


def _shards(folder: Path, total: int = 3) -> Path:
    for k in range(total):
        write_run(
            folder / "shards" / f"{k}-of-{total}",
            {"t": "qa_f1"},
            {"full@1": {"t": [record(str(k), 0.5)]}},
            shard=k,
            num_shards=total,
        )
    return folder


def _edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    shutil.rmtree(_shards(tmp_path) / "shards" / "1-of-3")
    with pytest.raises(UserError, match="lacks 1-of-3"):
        load_run(tmp_path)


def test_a_shard_without_run_json_is_refused(tmp_path: Path) -> None:
    (_shards(tmp_path) / "shards" / "1-of-3" / "run.json").unlink()
    with pytest.raises(UserError, match=r"1-of-3 has no run\.json"):
        load_run(tmp_path)


def test_overlapping_shards_are_refused(tmp_path: Path) -> None:
    shards = _shards(tmp_path) / "shards"
    path = prediction_path(shards / "2-of-3", "t", "full@1")
    path.write_text(path.read_text() + record("0", 0.5).to_json() + "\n")
    with pytest.raises(UserError, match=r"'0' with seed 42 is there twice.*0-of-3.*2-of-3"):
        load_run(tmp_path)


def test_two_splits_at_once_are_refused(tmp_path: Path) -> None:
    _shards(tmp_path, 2)
    _shards(tmp_path, 3)
    with pytest.raises(UserError, match="split in 2 and 3"):
        load_run(tmp_path)


def test_shards_beside_predictions_are_refused(tmp_path: Path) -> None:
    _shards(tmp_path)
    write_run(tmp_path, {"t": "qa_f1"}, {"full@1": {"t": [record("0", 0.5)]}})
    with pytest.raises(UserError, match="counted twice"):
        load_run(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"fingerprint": {"data": {"t": "abc"}, "model": {"dtype": "bfloat16"}}},
            r"differ in model\.dtype \('bfloat16' against None\)",
        ),
        ({"fingerprint": {"data": {"t": "x"}}}, r"differ in data\.t \('x' against 'abc'\)"),
        ({"model": "other"}, r"differ in model\.name \('other' against 'toy-1m'\)"),
        ({"shard": 0}, "says shard 0 of 3"),
        ({"num_shards": 4}, "says shard 1 of 4"),
    ],
)
def test_shards_of_another_run_are_refused(tmp_path: Path, values: dict, message: str) -> None:
    _edit(_shards(tmp_path) / "shards" / "1-of-3" / "run.json", **values)
    with pytest.raises(UserError, match=message):
        load_run(tmp_path)


def test_a_sample_twice_in_one_file_is_refused(tmp_path: Path) -> None:
    lines = [record("a", 0.5, decode_seconds=1.0), record("a", 0.5, decode_seconds=2.0)]
    write_run(tmp_path, {"t": "qa_f1"}, {"full@1": {"t": lines}})
    with pytest.raises(UserError, match=r"full@1\.jsonl, line 2 repeats an earlier one"):
        load_run(tmp_path)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run\.json"):
        load_run(tmp_path)
    (tmp_path / "run.json").write_text('{"model": "x"}')
    with pytest.raises(UserError, match="lacks benchmark, tasks, cells"):
        load_run(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match="cannot read"):
        load_run(tmp_path)


def test_a_task_without_a_known_metric_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path, {"t": "qa_f1"}, {"full@1": {"t": records([0.5]), "u": records([0.5])}})
    with pytest.raises(UserError, match=r"u belongs to a task that run\.json does not list"):
        load_run(tmp_path)


def test_cells_of_earlier_runs_into_the_same_folder_are_shown_last(tmp_path: Path) -> None:
    cells = {"h2o@0.5": {"t": records([0.1])}, "full@1": {"t": records([0.5])}}
    write_run(tmp_path, {"t": "qa_f1"}, cells)
    _edit(tmp_path / "run.json", cells=["full@1"])
    assert load_run(tmp_path).cells == ("full@1", "h2o@0.5")


def test_scores_in_summary_csv_are_not_rounded(tmp_path: Path) -> None:
    write_run(tmp_path, {"t": "qa_f1"}, {"full@1": {"t": records([1.0, 0.0, 0.0])}})
    write_summary(load_run(tmp_path))
    frame = pd.read_csv(StringIO((tmp_path / "summary.csv").read_text()))
    assert frame["score"][0] == pytest.approx(100 / 3, abs=1e-9)
