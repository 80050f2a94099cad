"""The workers' own prefix-cache counters: the true hit rate, whatever the router believes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kvrouter.bench.local_http import http_request

QUERIES = "vllm:prefix_cache_queries_total"
HITS = "vllm:prefix_cache_hits_total"


@dataclass(frozen=True, slots=True)
class CacheCounters:
    """Tokens looked up in, and taken from, a worker's prefix cache since it started."""

    queries: float
    hits: float


def parse_counters(text: str) -> CacheCounters:
    """Read the two counters from a Prometheus text page, summed over their labels (one set per engine).

    Raises:
        ValueError: one of them is not there, or is no number.
    """
    sums: dict[str, float] = {}
    for line in text.splitlines():
        name = line.partition("{")[0].partition(" ")[0]
        if name in (QUERIES, HITS):
            # The value follows the labels; a label's value may hold spaces and braces.
            fields = line[len(name) :].rpartition("}")[2].split()
            try:
                value = float(fields[0])
            except (IndexError, ValueError):
                raise ValueError(f"/metrics: no number in {line!r}") from None
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"/metrics: no counter has this value: {line!r}")
            sums[name] = sums.get(name, 0.0) + value
    for name in (QUERIES, HITS):
        if name not in sums:
            raise ValueError(f"/metrics has no {name}: is prefix caching on, and statistics logging not disabled?")
    return CacheCounters(sums[QUERIES], sums[HITS])


def scrape(worker_url: str) -> CacheCounters:
    """The counters of the worker at `worker_url` now.

    Raises:
        HttpError: it does not answer.
        ValueError: its page lacks the counters.
    """
    return parse_counters(http_request(f"{worker_url}/metrics", timeout_s=10.0))


def hit_rate(before: Sequence[CacheCounters | None], after: Sequence[CacheCounters | None]) -> float | None:
    """Share of prompt tokens taken from a cache between two readings of the same workers, in [0, 1].

    A worker that could not be read (None) at either time does not count. None if nothing was looked up.
    """
    pairs = [(b, a) for b, a in zip(before, after, strict=True) if b is not None and a is not None]
    queries = sum(a.queries - b.queries for b, a in pairs)
    hits = sum(a.hits - b.hits for b, a in pairs)
    return hits / queries if queries > 0 else None
