"""The prefix-cache counters of a vLLM engine in process."""

from __future__ import annotations

from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase


class CacheCounters(StatLoggerBase):  # type: ignore[misc, unused-ignore]
    """Sums up the tokens that the engine looked up in its prefix cache, and those that it found.

    vLLM takes factories of stat loggers; this is its own factory, so that whoever made it can read it.
    """

    def __init__(self, vllm_config: Any = None, engine_index: int = 0) -> None:
        self.queries = 0
        self.hits = 0

    def __call__(self, vllm_config: Any, engine_index: int = 0) -> CacheCounters:
        """As a factory: itself."""
        return self

    def record(self, scheduler_stats: Any = None, *args: Any, **kwargs: Any) -> None:
        """Takes one engine step's statistics."""
        stats = getattr(scheduler_stats, "prefix_cache_stats", None)
        if stats is not None:
            self.queries += stats.queries
            self.hits += stats.hits

    def log_engine_initialized(self) -> None:
        """Part of vLLM's interface; nothing is to be logged."""
