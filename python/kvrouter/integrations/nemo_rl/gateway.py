"""The gateway before the HTTP servers of NeMo-RL's workers, which NeMo-Gym's rollouts ask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvrouter.config import RouterConfig, routing_policy
from kvrouter.ray.router_handle import host_to_serve_on
from kvrouter.serve import KvService, ServeOptions
from kvrouter.worker_spec import WorkerSpec

# A rollout's request may wait for as long as a refit, and run for as long as its turn: NeMo-RL has limits of its own,
# and NeMo-Gym takes an answer of 429, 502, 503 or 504 for the end of the rollout.
_PATIENCE_S = 24 * 3600.0
LIMITS: dict[str, Any] = {
    "max_concurrency": 1 << 16,
    "max_queue": 1 << 20,
    "queue_timeout_s": _PATIENCE_S,
    "first_byte_timeout_s": _PATIENCE_S,
    "stream_timeout_s": _PATIENCE_S,
    "max_body_bytes": 256 << 20,
}


class Gateway:
    """``kvrouter serve`` in threads of this process, on any free port.

    urls: the workers' base URLs as NeMo-RL has them, ending in ``/v1``; they need not answer yet.
    publishers: where the workers publish, in the same order.
    Raises OSError, ValueError as ``KvService``.
    """

    def __init__(self, urls: Sequence[str | None], publishers: Sequence[Any], settings: RouterConfig) -> None:
        workers = [
            WorkerSpec(
                (url or "").removesuffix("/").removesuffix("/v1"),
                kv_events=f"tcp://{at.node_ip}:{at.ports.kv_events}",
                replay=f"tcp://{at.node_ip}:{at.ports.replay}" if settings.get("replay") else "",
                load=f"tcp://{at.node_ip}:{at.ports.load}",
            )
            for url, at in zip(urls, publishers, strict=True)
        ]
        self._service = KvService(
            ServeOptions(
                workers=workers,
                host=host_to_serve_on(),
                port=0,
                block_size=settings["block_size"],
                policy=routing_policy(settings),
                max_workers=len(workers),
                index_memory_limit=settings.get("index_memory_limit", 0),
                limits=LIMITS,
            )
        )

    @property
    def base_url(self) -> str:
        """Base URL of the OpenAI API, ending in ``/v1`` as those of the workers."""
        return f"{self._service.url}/v1"

    def close(self) -> None:
        """Ends it.  A second call does nothing."""
        self._service.close()
