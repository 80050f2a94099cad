"""What the router did, and what became of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvrouter.prediction import expected_cached_tokens

_LATENCIES_KEPT = 100_000


@dataclass(frozen=True, slots=True)
class Outcome:
    """A request that was answered.

    worker: who answered.
    predicted_blocks: leading blocks the router believed that worker to hold; None: not the router's choice.
    prompt_tokens, cached_tokens, generated_tokens: the engine's own account.
    retries: workers that failed before.
    fallback: the router was asked and did not answer.
    """

    worker: int
    predicted_blocks: int | None
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    retries: int = 0
    fallback: bool = False


class RouterMetrics:
    """Sums since the start or the last ``clear``; for one thread."""

    def __init__(self, num_workers: int, block_size: int) -> None:
        self.num_workers = num_workers
        self.block_size = block_size
        self.clear()

    def clear(self) -> None:
        """Starts anew."""
        self.decisions = 0
        self._latencies_us: deque[float] = deque(maxlen=_LATENCIES_KEPT)
        self._requests = np.zeros(self.num_workers, dtype=np.int64)
        self._tokens = np.zeros(self.num_workers, dtype=np.int64)
        self._prompt_tokens = self._cached_tokens = self._generated_tokens = 0
        self._predicted_tokens = self._predicted_of = 0
        self._fallbacks = self._retries = 0

    def record_decisions(self, latency_us: float, count: int) -> None:
        """``count`` requests were given a worker by one question, whose answer each waited ``latency_us`` for."""
        self.decisions += count
        self._latencies_us.extend([latency_us] * count)

    def record(self, outcomes: Sequence[Outcome]) -> None:
        """These requests were answered."""
        for outcome in outcomes:
            self._requests[outcome.worker] += 1
            self._tokens[outcome.worker] += outcome.prompt_tokens + outcome.generated_tokens
            self._prompt_tokens += outcome.prompt_tokens
            self._cached_tokens += outcome.cached_tokens
            self._generated_tokens += outcome.generated_tokens
            self._retries += outcome.retries
            self._fallbacks += outcome.fallback
            if outcome.predicted_blocks is not None:
                self._predicted_of += outcome.prompt_tokens
                self._predicted_tokens += expected_cached_tokens(
                    outcome.predicted_blocks, outcome.prompt_tokens, self.block_size
                )

    def as_dict(self) -> dict[str, Any]:
        """The figures, as JSON values.

        decisions: requests that the router gave a worker.
        decision_us_p50, decision_us_p99: how long a request waited for its worker, hashing and Ray call included,
            microseconds; the requests of a batch all wait for the batch.  None before the first.
        predicted_hit_rate, actual_hit_rate: share of prompt tokens expected, and found, in the engines' caches.
        requests_per_worker, tokens_per_worker: answered; tokens of prompts and answers.
        imbalance: tokens of the worker with the most over the mean; None before the first.
        fallbacks: requests that went round robin because the router did not answer.
        retries: attempts that failed because a worker was lost.
        """
        mean = float(self._tokens.mean())
        latencies = np.asarray(self._latencies_us)
        points = np.percentile(latencies, (50, 99)).tolist() if len(latencies) else [None, None]
        return {
            "decisions": self.decisions,
            "decision_us_p50": points[0],
            "decision_us_p99": points[1],
            "predicted_hit_rate": _share(self._predicted_tokens, self._predicted_of),
            "actual_hit_rate": _share(self._cached_tokens, self._prompt_tokens),
            "prompt_tokens": self._prompt_tokens,
            "cached_tokens": self._cached_tokens,
            "generated_tokens": self._generated_tokens,
            "requests_per_worker": self._requests.tolist(),
            "tokens_per_worker": self._tokens.tolist(),
            "imbalance": float(self._tokens.max()) / mean if mean > 0 else None,
            "fallbacks": self._fallbacks,
            "retries": self._retries,
        }


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole > 0 else None
