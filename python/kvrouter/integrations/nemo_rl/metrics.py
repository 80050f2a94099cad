"""What the router did in a training step, as flat numbers for NeMo-RL's logger (under ``train/``)."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kvrouter.bench.local_http import HttpError
from kvrouter.prediction import expected_cached_tokens
from kvrouter.ray.router_handle import Choice, RouterHandle

logger = logging.getLogger("kvrouter.nemo_rl")


class StepMetrics:
    """Counts in the process that trains; the router and the workers count for all processes."""

    def __init__(self, router: RouterHandle) -> None:
        self._router = router
        self._lock = threading.Lock()
        self._waits_us: list[float] = []
        self._predicted = self._predicted_of = 0
        self._counters: list[tuple[int, int]] = [(0, 0)] * router.num_workers
        self._before = _totals(router.status())

    def decided(self, choice: Choice, num_tokens: int, wait_s: float) -> None:
        """A request of this process has its worker."""
        with self._lock:
            self._waits_us.append(wait_s * 1e6)
            if choice.overlap_blocks is not None:
                self._predicted += expected_cached_tokens(choice.overlap_blocks, num_tokens, self._router.block_size)
                self._predicted_of += num_tokens

    def take(self, counters: Sequence[tuple[int, int]]) -> dict[str, float]:
        """The figures since the last call.

        counters: of each worker, prompt tokens looked up in its prefix cache and found there, since its start; fewer
            than there are workers when they could not be asked.

        ``router/`` and:

        - ``decisions``, ``fallbacks``: of all processes; those that the router failed to make.
        - ``decision_us_p50``, ``decision_us_p99``: how long requests of this process waited for their worker.
        - ``predicted_hit_rate``: share of this process's prompt tokens expected in the caches.
        - ``engine_hit_rate``, ``engine_hit_rate_min``: share of prompt tokens that the engines found, of all and of the
          worker with the least.
        - ``imbalance``: decisions of the worker with the most over the mean.
        - ``event_gaps``, ``workers_up``, ``cached_blocks``: gaps in KV events; workers reached, blocks known, now.

        What had no event in the step is left out.
        """
        try:
            status = self._router.status()
        except (HttpError, OSError, RuntimeError) as error:
            logger.warning("router metrics are left out: %s", error)
            return {}
        totals = _totals(status)
        with self._lock:
            waits, self._waits_us = self._waits_us, []
            predicted, self._predicted = self._predicted, 0
            predicted_of, self._predicted_of = self._predicted_of, 0
            before, self._before = self._before, totals
        delta = {name: totals[name] - before[name] for name in totals}
        figures = {name: float(value) for name, value in delta.items() if value.ndim == 0}
        if waits:
            figures["decision_us_p50"], figures["decision_us_p99"] = np.percentile(waits, (50, 99)).tolist()
        if predicted_of:
            figures["predicted_hit_rate"] = predicted / predicted_of
        if delta["per_worker"].sum() > 0:
            figures["imbalance"] = float(delta["per_worker"].max() / delta["per_worker"].mean())
        figures.update(self._engine_figures(counters))
        workers = status["workers"]
        figures["workers_up"] = float(sum(worker["state"] == "up" for worker in workers))
        figures["cached_blocks"] = float(sum(worker["cached_blocks"] for worker in workers))
        return {f"router/{name}": value for name, value in figures.items()}

    def _engine_figures(self, counters: Sequence[tuple[int, int]]) -> dict[str, float]:
        if len(counters) != len(self._counters):
            return {}
        delta = np.asarray(counters) - np.asarray(self._counters)
        self._counters = list(counters)
        if delta[:, 0].sum() <= 0:
            return {}
        asked = delta[delta[:, 0] > 0]
        return {
            "engine_hit_rate": float(asked[:, 1].sum() / asked[:, 0].sum()),
            "engine_hit_rate_min": float((asked[:, 1] / asked[:, 0]).min()),
        }


def _totals(status: Mapping[str, Any]) -> dict[str, Any]:
    """What only grows."""
    workers = status["workers"]
    return {
        "decisions": np.asarray(status["decisions"]),
        "fallbacks": np.asarray(status["fallbacks"]),
        "event_gaps": np.asarray(sum(worker["gaps"] for worker in workers)),
        "per_worker": np.asarray([worker["decisions"] for worker in workers]),
    }
