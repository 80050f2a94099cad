"""The Ray actor that the one router of a fleet lives in."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvrouter._core import RouterApiServer
from kvrouter.config import RouterConfig, WorkerAddress
from kvrouter.ray.router_metrics import Outcome, RouterMetrics
from kvrouter.router import KvRouter

logger = logging.getLogger("kvrouter.ray")

CONNECT_S = 5.0
MAX_CALLS = 8  # threads; one is taken by watch()


class RouterNotStartedError(RuntimeError):
    """The router knows no workers yet: it is being started, or was stopped."""


class RouterActor:
    """A ``KvRouter`` that every process of a Ray job can ask.

    It listens in threads of its own (C++), and decides while others ask.  Methods may run at the same time.
    """

    def __init__(self, config: RouterConfig, num_workers: int) -> None:
        self._config = config
        self._num_workers = num_workers
        self._lock = threading.Lock()
        self._router: KvRouter | None = None
        self._addresses: list[WorkerAddress] = []
        self._kv_events = True
        self._server: RouterApiServer | None = None
        self._metrics = RouterMetrics(num_workers, config["block_size"])

    def start(self, addresses: Sequence[WorkerAddress], enable_kv_indexer: bool = True) -> None:
        """Listens to workers at these addresses; nothing if it already does.

        Raises ValueError or RuntimeError, naming the setting, when it cannot.
        """
        with self._lock:
            if self._router is not None and self._addresses == list(addresses):
                return
            self._kv_events = enable_kv_indexer
            self._listen_at(list(addresses))

    def _listen_at(self, addresses: list[WorkerAddress]) -> None:
        router = KvRouter.from_config(
            {
                **self._config,
                "worker_addresses": [address.host for address in addresses],
                "worker_ports": [address.kv_events_port for address in addresses],
            },
            self._num_workers,
        )
        router.start(self._kv_events)
        if not router.wait_until_connected(CONNECT_S):
            logger.warning(
                "not every worker's publishers were reached within %.0f s; see the router's status", CONNECT_S
            )
        if self._router is not None:
            self._router.close()
        self._router, self._addresses = router, addresses

    def stop(self) -> None:
        """Stops listening; a second call does nothing."""
        with self._lock:
            if self._server is not None:
                self._server.stop()
                self._server = None
            if self._router is not None:
                self._router.close()
                self._router = None

    def watch(self) -> None:
        """Returns never: the call fails at the moment at which this process ends."""
        threading.Event().wait()

    def _listening(self) -> KvRouter:
        if self._router is None:
            raise RouterNotStartedError("the router is not started")
        return self._router

    # --- decisions ---

    def choose_batch(
        self, hashes: npt.NDArray[np.uint64], blocks: Sequence[int], num_tokens: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        """Workers for a batch of requests, decided together: each knows where the ones before it go.

        hashes: block hashes of all requests, one after the other; blocks: how many each has; num_tokens: its length.
        Returns the worker of each, and the leading blocks that it is believed to hold.
        """
        router = self._listening()
        ends = np.cumsum(blocks)[:-1]
        choices = [
            router._core.explain(of_request, length)
            for of_request, length in zip(np.split(hashes, ends), num_tokens, strict=True)
        ]
        return [choice.worker for choice in choices], [choice.overlap_blocks for choice in choices]

    def round_robin(self, count: int) -> list[int]:
        """The next ``count`` workers in turn."""
        router = self._listening()
        return [router.worker_round_robin() for _ in range(count)]

    # --- what the fleet tells ---

    def record_decisions(self, latency_us: float, count: int) -> None:
        """A caller waited so long for the workers of ``count`` requests."""
        with self._lock:
            self._metrics.record_decisions(latency_us, count)

    def record(self, outcomes: Sequence[Outcome]) -> None:
        """These requests were answered."""
        with self._lock:
            self._metrics.record(outcomes)

    def reset(self, worker: int | None = None) -> None:
        """A worker (None: each) has emptied its cache, or is gone and with it its cache."""
        if self._router is not None:
            self._router.reset(worker)

    def moved(self, worker: int, address: WorkerAddress) -> None:
        """A worker that was gone is back, perhaps elsewhere."""
        with self._lock:
            router = self._listening()
            if self._addresses[worker] == address:
                router.reset(worker)
                return
            logger.warning(
                "worker %d is back at another address (%s:%d): the router starts with an empty index",
                worker,
                address.host,
                address.kv_events_port,
            )
            addresses = list(self._addresses)
            addresses[worker] = address
            self._listen_at(addresses)

    # --- what others want to know ---

    def metrics(self, clear: bool = False) -> dict[str, Any]:
        """See ``RouterMetrics.as_dict``; ``clear`` starts anew."""
        with self._lock:
            figures = self._metrics.as_dict()
            if clear:
                self._metrics.clear()
            return figures

    def status(self) -> dict[str, Any]:
        """What ``KvRouter.status`` says."""
        return self._listening().status()

    def serve_http(self, host: str = "127.0.0.1", port: int = 0) -> str:
        """Serves this router over HTTP, too (``kvrouter.api``); returns its URL.  A second call changes nothing."""
        with self._lock:
            router = self._listening()
            if self._server is None:
                self._server = RouterApiServer(router._core, host, port)
            return f"http://{host}:{self._server.port}"
