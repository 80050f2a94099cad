"""vLLM's stat-logger plugin that publishes a worker's load for a router.

vLLM finds it through the entry-point group ``vllm.stat_logger_plugins`` in any environment where kvrouter is
installed, and makes one for each engine.  It does nothing unless the environment asks for it; see ``load_settings``.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase

from kvrouter.vllm.load_channel import LoadChannel, LoadSettings, endpoint_settings, load_settings

logger = logging.getLogger(__name__)


class LoadPublisher(StatLoggerBase):  # type: ignore[misc, unused-ignore]
    """Publishes ``{"kv_cache_usage", "num_waiting_reqs", "num_running_reqs"}`` after each engine step.

    For an engine in process that is to publish on an endpoint of its own, whatever the environment says::

        AsyncLLM.from_engine_args(args, stat_loggers=[partial(LoadPublisher, endpoint="tcp://*:5657")])

    No method raises: a worker without a publisher still serves.

    Parameters
    ----------
    vllm_config
        vLLM's configuration.
    engine_index
        The engine's data-parallel rank; added to the port.
    endpoint
        Endpoint to bind instead of what the environment says.
    """

    def __init__(self, vllm_config: Any = None, engine_index: int = 0, *, endpoint: str | None = None) -> None:
        self._channel: LoadChannel | None = None
        self._record_failed = False
        try:
            settings: LoadSettings | None
            if endpoint is None:
                settings = load_settings(os.environ, engine_index)
            else:
                settings = endpoint_settings(endpoint, "endpoint", engine_index)
        except ValueError as error:
            logger.warning("load is not published: %s", error)
            return
        if settings is None:
            logger.debug("load is not published: the environment does not ask for it")
            return
        parallel = getattr(vllm_config, "parallel_config", None)
        if getattr(parallel, "_api_process_count", 1) > 1:
            # Each step's statistics go to one of the server processes only, so none of them knows the load.
            if getattr(parallel, "_api_process_rank", 0) == 0:
                logger.warning(
                    "load is not published, although %s asks for it: start vLLM with --api-server-count 1",
                    settings.setting,
                )
            return
        self._channel = LoadChannel(settings.endpoint, settings.setting)

    @property
    def endpoint(self) -> str | None:
        """Where load is published; None when it is not."""
        return self._channel.endpoint if self._channel else None

    def record(self, scheduler_stats: Any = None, *args: Any, **kwargs: Any) -> None:
        """Takes one engine step's statistics; what else vLLM passes is ignored."""
        channel = self._channel
        if channel is None or scheduler_stats is None:
            return
        try:
            channel.publish(
                float(scheduler_stats.kv_cache_usage),
                # vLLM counts requests that wait for something else than room apart, and /metrics adds them up.
                int(scheduler_stats.num_waiting_reqs) + int(getattr(scheduler_stats, "num_skipped_waiting_reqs", 0)),
                int(scheduler_stats.num_running_reqs),
            )
        except Exception as error:
            if not self._record_failed:
                self._record_failed = True
                logger.warning("load is not published: vLLM's scheduler statistics cannot be read: %r", error)

    def log_engine_initialized(self) -> None:
        """Part of vLLM's interface; nothing is to be logged."""

    def close(self) -> None:
        """Stops publishing and frees the port."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
