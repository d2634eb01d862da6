"""Slow and obvious versions of the tensor code: one head, one token at a time, plain Python numbers.

Nothing here shares code with the package, but that its plain engine attends by `attend`. Functions take
tensors of one head, without batch, and return lists, except where a whole `(batch, kv_heads, …)` tensor
is named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kvmerge.check.naive import attend as attend


def each_head(function: Callable[..., Sequence], *tensors: Tensor) -> list[Sequence]:
    """Call `function` with every head of `(batch, heads, …)` tensors, in order."""
    flat = [tensor.flatten(0, 1) for tensor in tensors]
    return [function(*heads) for heads in zip(*flat, strict=True)]


def attention_map(
    queries: Tensor, keys: Tensor, *, scale: float | None = None, causal: bool = True, pad: int = 0
) -> list[list[float]]:
    """Softmax map of one query head; the first `pad` tokens neither see nor are seen."""
    length, head_dim = queries.shape
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    q, k = queries.tolist(), keys.tolist()
    rows = [[0.0] * length for _ in range(length)]
    for i in range(pad, length):
        seen = range(pad, i + 1 if causal else length)
        logits = {j: scale * sum(a * b for a, b in zip(q[i], k[j], strict=True)) for j in seen}
        top = max(logits.values())
        total = sum(math.exp(logit - top) for logit in logits.values())
        for j, logit in logits.items():
            rows[i][j] = math.exp(logit - top) / total
    return rows


def log_sum_exp(queries: Tensor, keys: Tensor, *, scale: float, causal: bool = True) -> list[float]:
    """Log-sum-exp of the scaled logits of each row of one query head."""
    q, k = queries.tolist(), keys.tolist()
    out = []
    for i in range(len(q)):
        seen = range(i + 1 if causal else len(k))
        logits = [scale * sum(a * b for a, b in zip(q[i], k[j], strict=True)) for j in seen]
        top = max(logits)
        out.append(top + math.log(sum(math.exp(logit - top) for logit in logits)))
    return out


def column_sums(
    queries: Tensor,
    keys: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """`(batch, kv_heads, T)` from the whole maps of `(batch, heads, T, head_dim)` queries."""
    batch, heads, length, _ = queries.shape
    kv_heads = keys.shape[1]
    sums = torch.zeros(batch, kv_heads, length, dtype=torch.float64)
    for row in range(batch):
        pad = 0 if lengths is None else length - int(lengths[row])
        for head in range(heads):
            kv_head = head * kv_heads // heads
            rows = attention_map(
                queries[row, head], keys[row, kv_head], scale=scale, causal=causal, pad=pad
            )
            for weights in rows:
                for column, weight in enumerate(weights):
                    sums[row, kv_head, column] += weight
    return sums


def cosine(left: Sequence[float], right: Sequence[float]) -> float:
    dot = sum(a * b for a, b in zip(left, right, strict=True))
    norms = [max(math.sqrt(sum(a * a for a in vector)), 1e-8) for vector in (left, right)]
    return dot / (norms[0] * norms[1])


def merging_sets(
    keys: Tensor,
    protected: Tensor,
    scores: Tensor,
    *,
    budget: int | None = None,
    threshold: float | None = None,
    linkage: str = "adjacent",
    underfill: str = "split",
) -> list[int]:
    """Set id of each token of one head, -1 where its set was evicted."""
    k, fixed, score = keys.tolist(), protected.tolist(), scores.tolist()
    if linkage == "adjacent":
        strengths = {
            i: cosine(k[i], k[i + 1]) for i in range(len(k) - 1) if not fixed[i] and not fixed[i + 1]
        }
        links = {i: c for i, c in strengths.items() if threshold is None or c > threshold}
    else:
        if threshold is None:
            threshold = searched(k, fixed, linkage, len(k) - budget)
        links = backward_scan(k, fixed, threshold, linkage)
    wanted = None
    if budget is not None and (threshold is None or underfill == "split"):
        wanted = len(k) - budget
    # weakest first, of equal ones the smaller index first
    by_strength = sorted(links, key=lambda i: (links[i], i))
    while wanted is not None and by_strength:
        if len(links) <= wanted:
            break
        del links[by_strength.pop(0)]
    sets: list[list[int]] = []
    for token in range(len(k)):
        if token - 1 in links:
            sets[-1].append(token)
        else:
            sets.append([token])
    while budget is not None and len(sets) > budget:
        worst = min(
            (members for members in sets if not fixed[members[0]]),
            key=lambda members: (sum(score[i] for i in members), -members[0]),
        )
        sets.remove(worst)
    ids = [-1] * len(k)
    for set_id, members in enumerate(sets):
        for token in members:
            ids[token] = set_id
    return ids


def backward_scan(
    keys: list[list[float]], protected: list[bool], threshold: float, linkage: str
) -> dict[int, float]:
    """Greedy scan from the last token: links, and the least similarity that the set needed so far."""
    links: dict[int, float] = {}
    members, least = [len(keys) - 1], math.inf
    for token in range(len(keys) - 2, -1, -1):
        if protected[token] or protected[token + 1]:
            members, least = [token], math.inf
            continue
        compared = members[:1] if linkage == "anchor" else members
        similarity = min(cosine(keys[token], keys[other]) for other in compared)
        if similarity >= threshold:
            least = min(least, similarity)
            links[token] = least
            members.append(token)
        else:
            members, least = [token], math.inf
    return links


def searched(keys: list[list[float]], protected: list[bool], linkage: str, n_links: int) -> float:
    """The threshold of a budget: enough links at it, not enough at one 8/4096 above it at most.

    Regula falsi; an end that stays twice counts half. It begins below what neighbours would need.
    """

    def spare(on_grid: int) -> int:
        return len(backward_scan(keys, protected, (on_grid + 0.5) / 4096, linkage)) - n_links

    open_ = [not protected[i] and not protected[i + 1] for i in range(len(keys) - 1)]
    chained = [cosine(keys[i], keys[i + 1]) if linkable else -1.0 for i, linkable in enumerate(open_)]
    needed = sorted([-1.0, *chained], reverse=True)[max(1, n_links) - 1]
    low, high, last = -4128, 4128, ""
    above, below = max(0, sum(open_) - n_links), n_links
    middle = math.floor((needed - 0.0801) * 4096)
    for step in range(1, 100):
        if high - low <= 8:
            break
        middle = min(max(middle, low + 1), high - 1)
        found = spare(middle)
        if found >= 0:
            low, above, below = middle, found, below // 2 if last == "low" else below
            last = "low"
        else:
            high, below, above = middle, -found, above // 2 if last == "high" else above
            last = "high"
        if step > 12:
            above = below = 0
        middle = low + (high - low) * (2 * above + 1) // (2 * (above + below + 1))
    return (low + 0.5) / 4096


def set_summary(set_ids: Tensor, scores: Tensor) -> list[tuple[int, int, float]]:
    """Size, pivot and score of each set of one head."""
    ids, score = set_ids.tolist(), scores.tolist()
    out = []
    for set_id in range(max(ids) + 1):
        members = [token for token, own in enumerate(ids) if own == set_id]
        pivot = members[0]
        for token in members:
            if score[token] > score[pivot]:
                pivot = token
        out.append((len(members), pivot, sum(score[token] for token in members)))
    return out


def gaussian_merge(
    keys: Tensor,
    values: Tensor,
    set_ids: Tensor,
    scores: Tensor,
    *,
    sigma: float | str = 5.0,
    value_scale: str = "none",
    pivot: str = "score",
    sizes: Tensor | None = None,
) -> list[tuple[list[float], list[float]]]:
    """Key and value of each set of one head."""
    ids = set_ids.tolist()
    k, v = keys.tolist(), values.tolist()
    counts = [1] * len(ids) if sizes is None else sizes.tolist()
    merged = []
    for set_id, (_, by_score, _) in enumerate(set_summary(set_ids, scores)):
        members = [token for token, own in enumerate(ids) if own == set_id]
        chosen = {"score": by_score, "first": members[0], "last": members[-1]}[pivot]
        distances = [math.dist(k[chosen], k[token]) for token in members]
        gauss = [math.exp(-(d**2) / (2 * width(distances, sigma) ** 2)) for d in distances]
        mass = [counts[token] * g for token, g in zip(members, gauss, strict=True)]
        weights = [m / sum(mass) for m in mass]
        total = sum(counts[token] for token in members)
        key = [
            sum(w * k[t][d] for w, t in zip(weights, members, strict=True)) for d in range(len(k[0]))
        ]
        value = []
        for d in range(len(v[0])):
            of = [v[t][d] / (counts[t] if value_scale == "size" else 1) for t in members]
            mean = sum(w * x for w, x in zip(weights, of, strict=True))
            value.append(mean * total if value_scale == "size" else mean)
        merged.append((key, value))
    return merged


def width(distances: list[float], sigma: float | str) -> float:
    """The Gaussian's sigma for one set; distances are to the pivot, its own 0 included."""
    size, total = len(distances), sum(distances)
    if sigma == "inf":
        return math.inf
    if not isinstance(sigma, str):
        return sigma
    if total == 0:
        return 1.0
    if sigma == "mean_distance":
        return max(total / (math.sqrt(2) * (size - 1)), 1e-6)
    if sigma == "mean_distance_n":
        return max(total / (math.sqrt(2) * size), 1e-6)
    assert sigma == "fixed_point"
    current = 5.0
    for _ in range(100):
        gauss = [math.exp(-(d**2) / (2 * max(current, 1e-6) ** 2)) for d in distances]
        previous, current = current, sum(gauss) / (math.sqrt(2) * size)
        if abs(current - previous) < 1e-6:
            break
    return max(current, 1e-6)


def best_positions(scores: Sequence[float], count: int) -> list[int]:
    """The `count` largest, ties to the lower index, ascending."""
    ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return sorted(ranked[:count])


def h2o_keep(scores: Tensor, *, heavy: int, recent: int) -> list[int]:
    length = scores.shape[0]
    recent = min(recent, length)
    candidates = scores.tolist()[: length - recent]
    return best_positions(candidates, heavy) + list(range(length - recent, length))


def cam_column_probabilities(scores: Tensor, *, start: int, recent: int) -> list[float]:
    s = scores.tolist()
    out = [0.0] * len(s)
    for i in range(start, len(s) - recent):
        best = max(s[:start] + s[i : i + recent])
        out[i] = min(max(s[i] / best, 0.0), 1.0) if best > 0 else 0.0
    return out


def cam_banded_probabilities(attention: Tensor, *, start: int, recent: int) -> list[float]:
    """From the whole map: each evicted token's column, over the rows that its window still sees."""
    a = attention.tolist()
    length = len(a)
    out = [0.0] * length
    for i in range(start, length - recent):
        end = i + recent
        own = sum(a[q][i] for q in range(i, end))
        sinks = [sum(a[q][j] for q in range(end)) for j in range(start)]
        window = [sum(a[q][j] for q in range(j, end)) for j in range(i, end)]
        best = max(sinks + window)
        out[i] = min(max(own / best, 0.0), 1.0) if best > 0 else 0.0
    return out


def cam_merge_values(
    values: Tensor,
    probabilities: Sequence[float],
    draw: Tensor | None,
    *,
    start: int,
    recent: int,
    merge_budget: int,
) -> list[list[float]]:
    """The authors' loop: one token after the other, in place."""
    v = values.tolist()
    for i in range(start, len(v) - recent):
        share = probabilities[i] if draw is None else float(float(draw[i]) < probabilities[i])
        for j in range(i + 1, min(i + merge_budget, len(v) - 1) + 1):
            v[j] = [x + share * own / merge_budget for x, own in zip(v[j], v[i], strict=True)]
    return v


def snapkv_scores(
    queries: Tensor, keys: Tensor, *, window: int, kernel: int, pooling: str
) -> list[float]:
    """Pooled scores before the window of one KV head; queries `(group, T, head_dim)`."""
    length, past = keys.shape[0], keys.shape[0] - window
    sums = [0.0] * past
    for query_head in queries:
        rows = attention_map(query_head, keys)
        for row in rows[length - window :]:
            for token in range(past):
                sums[token] += row[token] / len(queries)
    out = []
    for token in range(past):
        near = [sums[i] for i in range(token - kernel // 2, token + kernel // 2 + 1) if 0 <= i < past]
        out.append(max(near) if pooling == "max" else sum(near) / kernel)
    return out


def d2o_merge(
    keys: Tensor, values: Tensor, kept: Sequence[int], threshold: float
) -> tuple[list[list[float]], list[list[float]]]:
    """Keys and values of the kept entries of one head; evicted ones merge at `threshold` or above."""
    k, v = keys.tolist(), values.tolist()
    members: dict[int, list[tuple[float, int]]] = {slot: [] for slot in kept}
    for slot in range(len(k)):
        if slot in members:
            continue
        nearest = max(kept, key=lambda other, slot=slot: (cosine(k[slot], k[other]), -other))
        if cosine(k[slot], k[nearest]) >= threshold:
            members[nearest].append((cosine(k[slot], k[nearest]), slot))

    def merged(states: list[list[float]]) -> list[list[float]]:
        out = []
        for slot, given in members.items():
            vectors = [states[slot], *[[u * x for x in states[other]] for u, other in given]]
            out.append([sum(column) / len(vectors) for column in zip(*vectors, strict=True)])
        return out

    return merged(k), merged(v)


def chunk_sets(protected: Sequence[bool], n_keep: int) -> list[int]:
    """Set id of each token: protected ones alone, the others in chunks, numbered by first member."""
    free = [token for token, fixed in enumerate(protected) if not fixed]
    n_chunks = n_keep - (len(protected) - len(free))
    sets = [[token] for token, fixed in enumerate(protected) if fixed]
    for chunk in range(n_chunks, 0, -1):
        size = math.ceil(len(free) / chunk)
        sets.append(free[:size])
        free = free[size:]
    ids = [0] * len(protected)
    for set_id, members in enumerate(sorted(sets)):
        for token in members:
            ids[token] = set_id
    return ids
