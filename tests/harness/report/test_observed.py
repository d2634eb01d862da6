"""Components of variance against known ones, means, and verdicts that can go each way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.metric import Array
from harness.observation import Observation
from harness.report.bootstrap import Estimate
from harness.report.observed.claims import REFUTED, SUPPORTED, UNDECIDED, Claim, claims
from harness.report.observed.run import ObservedRun
from harness.report.observed.tables import size_labels
from harness.report.observed.variance import NAMES, OF_TASK, components, decompose, share_of
from kvmerge.observations import KINDS, RULES, SIZES

TRUTH = {
    "layer": 4.0,
    "head": 2.0,
    "task": 1.0,
    "sample": 0.5,
    "layer x task": 0.8,
    "head x task": 0.3,
    "layer x sample": 0.4,
    "residual": 0.2,
}


def drawn(
    rng: np.random.Generator, sizes: Sequence[int], layers: int = 6, heads: int = 3, **changes: float
) -> tuple[Array, Array]:
    """Values of a design whose effects have the variances of `TRUTH`; the task of each sample."""
    spread = {name: np.sqrt(value) for name, value in (TRUTH | changes).items()}
    tasks = np.repeat(np.arange(len(sizes)), sizes)
    count = len(tasks)

    def effect(name: str, *shape: int) -> Array:
        return rng.normal(0, spread[name], shape)

    values = 10 + effect("layer", 1, layers, 1) + effect("head", 1, layers, heads)
    values = values + effect("task", len(sizes), 1, 1)[tasks]
    values = values + effect("layer x task", len(sizes), layers, 1)[tasks]
    values = values + effect("head x task", len(sizes), layers, heads)[tasks]
    values = values + effect("sample", count, 1, 1) + effect("layer x sample", count, layers, 1)
    return values + effect("residual", count, layers, heads), tasks


# variance


@pytest.mark.parametrize("sizes", [[5] * 6, [2, 9, 4, 1, 7, 3]], ids=["balanced", "unbalanced"])
def test_the_components_are_unbiased(sizes: list[int]) -> None:
    rng = np.random.default_rng(0)
    found = [components(*drawn(rng, sizes)) for _ in range(600)]
    for name, truth in TRUTH.items():
        estimates = np.array([each[name] for each in found])
        error = estimates.std() / np.sqrt(len(estimates))
        assert abs(estimates.mean() - truth) < 4 * error, name
        assert error < 0.1 * truth + 0.02, "the test could not tell"


def test_values_without_noise_are_taken_apart_exactly() -> None:
    layers = np.array([0.0, 2.0])
    values = np.tile(layers[None, :, None], (4, 1, 3))
    found = components(values, np.array(["a", "a", "b", "b"]))
    assert found.keys() == set(NAMES.values())
    assert found["layer"] == pytest.approx(2.0)  # the variance of 0 and 2
    assert all(value == pytest.approx(0) for name, value in found.items() if name != "layer")
    shares = {each.name: each.share for each in decompose(values, ["a", "a", "b", "b"])}
    assert shares["layer"] == Estimate(1, 1, 1)
    assert shares["task"] == Estimate(0, 0, 0)


def test_intervals_hold_the_share_that_more_samples_would_give() -> None:
    held = 0
    trials = 60
    for seed in range(trials):
        rng = np.random.default_rng(seed)
        values, tasks = drawn(rng, [200] * 5)
        variances = components(values, tasks)  # of the same layers, heads and tasks
        above = {name: max(0.0, variance) for name, variance in variances.items()}
        truth = above["sample"] / sum(above.values())
        few = np.concatenate([np.flatnonzero(tasks == task)[:8] for task in range(5)])
        shown = share_of(values[few], tasks[few], ["sample"])
        assert shown is not None
        held += shown.low <= truth <= shown.high
    assert 0.8 * trials <= held


def test_shares_sum_to_one_and_what_is_negative_counts_as_nil() -> None:
    values, tasks = drawn(np.random.default_rng(1), [3] * 4, task=0.0)
    found = decompose(values, list(tasks))
    assert sum(each.share.value for each in found) == pytest.approx(1)
    for each in found:
        assert each.share.value >= 0
        assert each.share.low <= each.share.value <= each.share.high
        assert (each.variance <= 0) == (each.share.value == 0)
    together = share_of(values, list(tasks), OF_TASK)
    assert together is not None
    of_task = [each.share.value for each in found if each.name in OF_TASK]
    assert together.value == pytest.approx(sum(of_task))


@pytest.mark.parametrize(
    ("tasks", "names"),
    [
        (["a", "a", "b"], set(NAMES.values())),
        (["a", "a", "a"], {"layer", "head", "sample", "layer x sample", "residual"}),
        (["a", "b", "c"], {"layer", "head", "sample", "layer x sample", "residual"}),
        (["a"], set()),
    ],
    ids=["two tasks", "one task", "a sample a task", "one sample"],
)
def test_only_components_that_can_be_told_are_given(tasks: list[str], names: set[str]) -> None:
    values = np.random.default_rng(0).normal(size=(len(tasks), 3, 2))
    assert {each.name for each in decompose(values, tasks)} == names
    assert (share_of(values, tasks, OF_TASK) is None) == ("task" not in names)


def test_a_model_of_one_layer_and_head_has_what_varies_over_samples() -> None:
    values = np.random.default_rng(0).normal(size=(6, 1, 1))
    found = {each.name for each in decompose(values, ["a", "a", "a", "b", "b", "b"])}
    assert found == {"task", "sample"}


# means and claims


def observation(sample: int, **changes: Any) -> Observation:
    """An observation of 4 layers of 2 heads that agrees with every claim; changes speak against."""
    near = {"keys": [0.9, 0.5], "keys_before_rope": [0.9, 0.8], "values": [0.3, 0.2]}
    fields: dict[str, Any] = {
        "id": str(sample),
        "prompt_hash": "0",
        "prompt_tokens": 100 + sample,
        "layers": [0, 1, 2, 3],
        "cosine": {kind: [[near[kind]] * 2] * 4 for kind in KINDS},
        "ratio": [
            [[0.1 * layer + 0.01 * head + 0.001 * sample] for head in (0, 1)] for layer in (1, 2, 3, 4)
        ],
        "sizes": [[1] * (len(SIZES) + 1)] * 4,
        "distance": [[1.0, 2.0, 3.0]] * 4,
        "sigma": {rule: [[4.0, 5.0, 6.0]] * 4 for rule in RULES},
        "entropy": [[3.0, 3.0]] * 4,
        "flatness": [[0.9, 0.9], [0.9, 0.9], [0.3, 0.3], [0.8, 0.8]],
    }
    return Observation(**(fields | changes))


def observed(tasks: dict[str, list[Observation]]) -> ObservedRun:
    measured = {"distances": [1, 64], "thresholds": [0.75], "epsilon": 0.75}
    info = {"model": "toy", "benchmark": "toy", "fingerprint": {"observe": measured}}
    return ObservedRun(Path(), info, tasks, None)


def judged(**changes: Any) -> dict[str, Claim]:
    tasks = {name: [observation(sample, **changes) for sample in range(3)] for name in ("a", "b")}
    return {claim.name: claim for claim in claims(observed(tasks))}


def test_a_run_that_agrees_supports_every_claim() -> None:
    assert {claim.verdict for claim in judged().values()} == {SUPPORTED}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("similar_keys", {"cosine": {kind: [[[0.7, 0.1]] * 2] * 4 for kind in KINDS}}),
        ("local", {"cosine": {kind: [[[0.8, 0.9]] * 2] * 4 for kind in KINDS}}),
        ("values", {"cosine": {kind: [[[0.8, 0.1]] * 2] * 4 for kind in KINDS}}),
        *((f"sigma_{rule}", {"sigma": dict.fromkeys(RULES, [[7.0, 8.0, 9.0]] * 4)}) for rule in RULES),
        ("flat_first", {"flatness": [[0.1, 0.1], [0.1, 0.1], [0.3, 0.3], [0.8, 0.8]]}),
        ("flat_last", {"flatness": [[0.9, 0.9], [0.9, 0.9], [0.3, 0.3], [0.2, 0.2]]}),
    ],
)
def test_a_run_that_does_not_refutes_the_claim(name: str, changes: dict[str, Any]) -> None:
    assert judged(**changes)[name].verdict == REFUTED


def test_ratios_that_differ_by_task_refute_that_they_do_not() -> None:
    def of(sample: int, base: float) -> Observation:
        return observation(sample, ratio=[[[base + 0.001 * sample]] * 2] * 4)

    tasks = {name: [of(sample, base) for sample in range(4)] for name, base in (("a", 0.2), ("b", 0.6))}
    found = {claim.name: claim for claim in claims(observed(tasks))}
    assert found["ratio_of_the_model"].verdict == REFUTED
    assert found["ratio_independent_of_data"].verdict == REFUTED
    assert found["ratio_independent_of_data"].value.value == pytest.approx(1.0, rel=0.01)


def test_one_sample_or_task_decides_nothing_about_data() -> None:
    for tasks in ({"a": [observation(0)]}, {"a": [observation(0), observation(1)]}):
        found = {claim.name: claim for claim in claims(observed(tasks))}
        assert found["ratio_of_the_model"].verdict == UNDECIDED
        assert found["ratio_independent_of_data"].verdict == UNDECIDED
    alone = claims(observed({"a": [observation(0)]}))
    assert {claim.verdict for claim in alone} == {UNDECIDED}


def test_an_interval_across_the_bound_is_undecided() -> None:
    mixed = [observation(0), observation(1, flatness=[[0.1] * 2, [0.1] * 2, [0.9] * 2, [0.1] * 2])]
    found = {claim.name: claim for claim in claims(observed({"a": mixed}))}
    assert found["flat_first"].verdict == found["flat_last"].verdict == UNDECIDED


def test_averages_give_each_task_the_same_weight_and_leave_out_what_is_missing() -> None:
    run = observed({"a": [observation(0)] * 3, "b": [observation(0)]})
    values = np.array([[1.0, 1.0], [2.0, np.nan], [3.0, 3.0], [10.0, 8.0]])
    np.testing.assert_allclose(run.mean(values), [6.0, 5.0])
    np.testing.assert_allclose(run.mean(values, ["a"]), [2.0, 2.0])


def test_replicates_are_drawn_within_tasks() -> None:
    run = observed({name: [observation(sample) for sample in range(3)] for name in "ab"})
    mean, replicates = run.average(np.array([0.0, 1.0, 2.0, 10.0, 10.0, 10.0]))
    assert float(mean) == 5.5
    assert replicates.shape == (10_000,)
    assert (replicates.min(), replicates.max()) == (5.0, 6.0)
    assert replicates.std() == pytest.approx(np.sqrt(2 / 3 / 3) / 2, rel=0.05)


def test_distances_that_one_task_does_not_reach_are_left_out() -> None:
    short = {kind: [[[0.9, None]] * 2] * 4 for kind in KINDS}
    run = observed({"a": [observation(0)], "b": [observation(0, cosine=short)]})
    assert run.reached == [0]


def test_classes_of_size_have_names() -> None:
    assert size_labels() == ["1", "2", "3-4", "5-8", "9-16", "17-32", "33-64", "65+"]
