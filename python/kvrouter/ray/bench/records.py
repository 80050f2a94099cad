"""What became of one sample, and the figures of one run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvrouter.bench.client import RequestRecord
from kvrouter.bench.stats import percentiles, summarize


@dataclass(slots=True)
class RayRequestRecord(RequestRecord):
    """A ``RequestRecord`` with what Ray adds.

    router_us: how long the sample waited for its worker: in a batch, for the whole batch's decision.
    transit_ms: from the decision to the call's arrival in the worker's actor, milliseconds, by the nodes' clocks.
    node: number of the worker's node, from 0.
    remote: whether that is another node than the driver's.
    """

    transit_ms: float | None = None
    node: int = 0
    remote: bool = False


def figures_of(
    records: Sequence[RayRequestRecord],
    *,
    wall_s: float,
    decisions_s: float,
    hit_rate: float | None,
    num_workers: int,
    num_nodes: int,
    block_size: int,
) -> dict[str, Any]:
    """The figures of one run: those of ``kvrouter.bench.stats.summarize``, and

    - ``all_tokens_per_s``: of prompts and answers together;
    - ``tokens_per_worker``, ``imbalance`` (the most over the mean), ``requests_per_node``;
    - ``router_share_of_request``: mean wait for a decision over mean latency, ``router_share_of_wall``: time spent
      waiting for decisions (``decisions_s``) over the run's;
    - ``transit_ms``: ``{"local": {"p50", "p99", "requests"}, "remote": ...}``.
    """
    figures = summarize(records, wall_s=wall_s, hit_rate=hit_rate, num_workers=num_workers, block_size=block_size)
    tokens = [0] * num_workers
    for record in records:
        if record.worker is not None:
            tokens[record.worker] += record.prompt_tokens + record.completion_tokens
    nodes = Counter(record.node for record in records)
    waits = [record.router_us for record in records if record.router_us is not None]
    latencies = [record.latency_ms for record in records if record.latency_ms is not None]
    figures |= {
        "all_tokens_per_s": sum(tokens) / wall_s,
        "tokens_per_worker": tokens,
        "imbalance": max(tokens) * num_workers / sum(tokens) if any(tokens) else None,
        "requests_per_node": [nodes[node] for node in range(num_nodes)],
        "router_share_of_request": (sum(waits) / len(waits)) / (1e3 * sum(latencies) / len(latencies))
        if waits and latencies
        else None,
        "router_share_of_wall": decisions_s / wall_s,
        "transit_ms": {place: _transit(records, remote) for place, remote in (("local", False), ("remote", True))},
    }
    return figures


def _transit(records: Sequence[RayRequestRecord], remote: bool) -> dict[str, Any]:
    values = [record.transit_ms for record in records if record.remote is remote and record.transit_ms is not None]
    return {**percentiles(values, (50, 99)), "requests": len(values)}
