"""From request records to figures."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from kvrouter.bench.client import RequestRecord
from kvrouter.prediction import expected_cached_tokens


def percentiles(values: Iterable[float], points: Sequence[int]) -> dict[str, float | None]:
    """``{"p50": ..., ...}`` by linear interpolation; None for each if there are no values."""
    array = np.fromiter(values, dtype=np.float64)
    if array.size == 0:
        return {f"p{point}": None for point in points}
    return {f"p{point}": float(value) for point, value in zip(points, np.percentile(array, points), strict=True)}


def prediction_agreement(records: Iterable[RequestRecord], block_size: int) -> float | None:
    """Share of the routed requests whose predicted overlap is what the worker took from its cache, in [0, 1].

    None if no request carries both figures (the worker does not report cached tokens, or the router predicts none).
    """
    verdicts = [
        expected_cached_tokens(r.predicted_blocks, r.prompt_tokens, block_size) == r.cached_tokens
        for r in records
        if r.predicted_blocks is not None and r.cached_tokens is not None
    ]
    return sum(verdicts) / len(verdicts) if verdicts else None


def summarize(
    records: Sequence[RequestRecord], *, wall_s: float, hit_rate: float | None, num_workers: int, block_size: int
) -> dict[str, Any]:
    """The figures of one mode of one run.

    Args:
        records: of every request, answered or not.
        wall_s: from the first request to the last answer, seconds.
        hit_rate: from the workers' counters, in [0, 1].
        num_workers: length of ``requests_per_worker``.
        block_size: tokens in a block.

    Returns:
        JSON values. Rates are per second of `wall_s`; ``tokens_per_s`` counts generated tokens; ``*_ms`` are
        milliseconds and ``*_us`` microseconds.
    """
    answered = [record for record in records if record.worker is not None]
    per_worker = [0] * num_workers
    for record in answered:
        if record.worker is not None:
            per_worker[record.worker] += 1
    return {
        "hit_rate": hit_rate,
        "requests_per_s": len(answered) / wall_s,
        "tokens_per_s": sum(r.completion_tokens for r in answered) / wall_s,
        "ttft_ms": percentiles((r.ttft_ms for r in answered if r.ttft_ms is not None), (50, 95, 99)),
        "latency_ms": percentiles((r.latency_ms for r in answered if r.latency_ms is not None), (50, 95, 99)),
        "router_us": percentiles((r.router_us for r in records if r.router_us is not None), (50, 99)),
        "hash_us": percentiles((r.hash_us for r in records if r.router_us is not None), (50, 99)),
        "requests_per_worker": per_worker,
        "requests": len(records),
        "failed": len(records) - len(answered),
        "retried": sum(record.attempts > 1 for record in records),
        "without_router": sum(record.router_us is None for record in records),
        "prediction_agreement": prediction_agreement(answered, block_size),
        "wall_s": wall_s,
    }


def median_of(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The median of each figure over repeats; a figure that a run lacks (None) is left out of its median."""
    return _combine(list(runs), statistics.median)  # type: ignore[no-any-return]


def spread_of(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """``[min, max]`` of each figure over repeats."""
    return _combine(list(runs), lambda values: [min(values), max(values)])  # type: ignore[no-any-return]


def _combine(values: list[Any], join: Callable[[list[float]], Any]) -> Any:
    present = [value for value in values if value is not None]
    if not present:
        return None
    if isinstance(present[0], dict):
        return {key: _combine([value[key] for value in present], join) for key in present[0]}
    if isinstance(present[0], list):
        return [_combine(list(column), join) for column in zip(*present, strict=True)]
    return join(present)


def ecdf(values: Sequence[float]) -> tuple[list[float], list[float]]:
    """The empirical distribution of `values`: sorted, and the share of values at or below each, in (0, 1]."""
    ordered = sorted(values)
    return ordered, [(rank + 1) / len(ordered) for rank in range(len(ordered))]
