"""Where does one sample's time go?"""

from __future__ import annotations

from collections import defaultdict

from torch.profiler import ProfilerActivity, profile

from scripts.bench.measure import COMPARISON, Bench, Report

_STAGES = {
    "linear layers": ("linear", "addmm", "aten::mm"),
    "prompt attention": ("flash_attention",),
    "scores": ("bmm", "exp", "baddbmm"),
}


def stages(bench: Bench, length: int = 3500, tokens: int = 64) -> Report:
    """Self time by kind of operator, of one sample with seven cells."""
    ids, rows = [bench.prompt(length)], bench.rows(COMPARISON)
    bench.run(ids, rows, 2)
    with profile(activities=[ProfilerActivity.CPU]) as taken:
        bench.run(ids, rows, tokens)
    seconds: dict[str, float] = defaultdict(float)
    operators: dict[str, float] = {}
    for event in taken.key_averages():
        kind = next(
            (stage for stage, marks in _STAGES.items() if any(m in event.key for m in marks)), "other"
        )
        seconds[kind] += event.self_cpu_time_total / 1e6
        operators[event.key] = round(event.self_cpu_time_total / 1e6, 4)
    total = sum(seconds.values())
    largest = dict(sorted(operators.items(), key=lambda item: -item[1])[:25])
    return Report(
        "profile",
        "Where one sample's time goes",
        f"Seven cells, a prompt of {length:,} tokens, {tokens} answer tokens; torch's profiler, self "
        "time of operators.",
        [
            {"stage": kind, "s": round(value, 2), "share %": round(100 * value / total, 1)}
            for kind, value in sorted(seconds.items(), key=lambda item: -item[1])
        ],
        raw={"largest operators, s": largest},
    )
