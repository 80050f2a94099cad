"""What the router did, and what became of it.

Each worker keeps the ledger of the requests it served, with what their sender said of the decision: so all processes'
requests are counted, whoever sent them, and nobody is told of anything but the request itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvrouter.prediction import expected_cached_tokens
from kvrouter.ray.engine.base import SampleRequest, SampleResult

_WAITS_KEPT = 20_000


@dataclass
class Ledger:
    """One worker's requests since its start or the last ``take``.

    decisions: of them, those that the router gave this worker.
    waits_us: how long these waited for the decision.
    predicted_tokens, predicted_of: prompt tokens that the router expected in the cache, and of how many.
    fallbacks: the router was asked, and did not answer.
    retries: workers that failed before this one.
    """

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    decisions: int = 0
    predicted_tokens: int = 0
    predicted_of: int = 0
    fallbacks: int = 0
    retries: int = 0
    waits_us: deque[float] = field(default_factory=lambda: deque(maxlen=_WAITS_KEPT))

    def record(self, request: SampleRequest, result: SampleResult, block_size: int) -> None:
        """This request was served."""
        self.requests += 1
        self.prompt_tokens += len(request.tokens)
        self.cached_tokens += result.cached_tokens
        self.generated_tokens += len(result.tokens)
        decision = request.decision
        if decision is None:
            return
        self.fallbacks += decision.fallback
        self.retries += decision.retries
        if decision.overlap_blocks is not None:
            self.decisions += 1
            self.waits_us.append(decision.wait_s * 1e6)
            self.predicted_of += len(request.tokens)
            self.predicted_tokens += expected_cached_tokens(decision.overlap_blocks, len(request.tokens), block_size)


def summed_up(ledgers: Sequence[Ledger]) -> dict[str, Any]:
    """The figures of a fleet, as JSON values; one ledger a worker.

    decisions: requests whose worker the router chose.
    decision_us_p50, decision_us_p99: how long a request waited for its worker, hashing included, microseconds; the
        requests of a batch all wait for the batch.  None before the first.
    predicted_hit_rate, actual_hit_rate: share of prompt tokens expected, and found, in the engines' caches.
    requests_per_worker, tokens_per_worker: answered; tokens of prompts and answers.
    imbalance: tokens of the worker with the most over the mean; None before the first.
    fallbacks: requests that went round robin because the router did not answer.
    retries: attempts that failed because a worker was lost.
    """

    def total(name: str) -> int:
        return sum(getattr(ledger, name) for ledger in ledgers)

    tokens = [ledger.prompt_tokens + ledger.generated_tokens for ledger in ledgers]
    waits = np.concatenate([np.asarray(ledger.waits_us, dtype=np.float64) for ledger in ledgers])
    points = np.percentile(waits, (50, 99)).tolist() if len(waits) else [None, None]
    return {
        "decisions": total("decisions"),
        "decision_us_p50": points[0],
        "decision_us_p99": points[1],
        "predicted_hit_rate": _share(total("predicted_tokens"), total("predicted_of")),
        "actual_hit_rate": _share(total("cached_tokens"), total("prompt_tokens")),
        "prompt_tokens": total("prompt_tokens"),
        "cached_tokens": total("cached_tokens"),
        "generated_tokens": total("generated_tokens"),
        "requests_per_worker": [ledger.requests for ledger in ledgers],
        "tokens_per_worker": tokens,
        "imbalance": max(tokens) * len(tokens) / sum(tokens) if any(tokens) else None,
        "fallbacks": total("fallbacks"),
        "retries": total("retries"),
    }


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole > 0 else None
