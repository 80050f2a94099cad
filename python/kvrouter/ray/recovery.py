"""Brings lost workers back: watches them, restarts their engines with the fleet's weights, tells the router."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import ray

from kvrouter.config import WorkerAddress
from kvrouter.ray import background
from kvrouter.ray.health import FleetHealth
from kvrouter.ray.router_handle import RouterHandle
from kvrouter.ray.worker import WorkerNotReadyError, WorkerReport

logger = logging.getLogger("kvrouter.ray")

RETRY_S = 0.25
START_TIMEOUT_S = 900.0


class Recovery:
    """Runs in every process that sends requests; its loop is the process's background one.

    The owner of the fleet (who made it) watches all workers, and restarts engines.  A process that only has a handle
    waits until a worker that it lost serves again.
    """

    def __init__(
        self, leaders: Sequence[Any], devices: Sequence[Sequence[str]], health: FleetHealth, owner: bool
    ) -> None:
        self._leaders = list(leaders)
        self._devices = devices
        self._health = health
        self._owner = owner
        self._lock = threading.Lock()
        self._under_way: set[int] = set()
        self._futures: list[Future[None]] = []
        self._closed = False
        #: Ray's reference to the ``WeightSource`` for a worker that comes back; None: what its config says.
        self.weights: Any = None
        #: Set when the fleet has a router; told of losses and returns.
        self.router: RouterHandle | None = None
        self.reports: dict[int, WorkerReport] = {}

    def start_all(self) -> list[WorkerReport]:
        """Owner: starts every engine, all at once, and watches them from then on.  Raises RuntimeError if one fails."""
        calls = [leader.start.remote(devices) for leader, devices in zip(self._leaders, self._devices, strict=True)]
        try:
            reports: list[WorkerReport] = ray.get(calls, timeout=START_TIMEOUT_S)
        except ray.exceptions.RayTaskError as error:
            raise RuntimeError(str(error.cause)) from None
        except ray.exceptions.GetTimeoutError:
            raise RuntimeError(f"the engines have not started within {START_TIMEOUT_S:.0f} s") from None
        except ray.exceptions.RayError as error:
            raise RuntimeError(f"a worker was lost while its engine started: {error}") from None
        self.reports = {report.rank: report for report in reports}
        for worker in range(len(self._leaders)):
            self._futures.append(background.spawn(self._watch(worker)))
        return reports

    def lost(self, worker: int) -> None:
        """A request to this worker failed: from now on it gets none, until it serves again."""
        with self._lock:
            if self._closed or worker in self._under_way:
                return
            self._under_way.add(worker)
        self._health.mark_down(worker)
        router = self.router
        if router is not None and router.is_here:
            background.spawn(router.reset(worker))
        future = background.spawn(self._bring_back(worker))
        with self._lock:
            self._futures.append(future)

    def close(self) -> None:
        """Watches nothing any more; a second call does nothing."""
        with self._lock:
            self._closed = True
            futures, self._futures = self._futures, []
        for future in futures:
            future.cancel()

    async def _watch(self, worker: int) -> None:
        while not self._closed:
            try:
                await self._leaders[worker].watch.remote()
            except ray.exceptions.RayError:
                if self._closed:
                    return
                self.lost(worker)
                while worker in self._under_way and not self._closed:
                    await asyncio.sleep(RETRY_S)

    async def _bring_back(self, worker: int) -> None:
        try:
            logger.warning("worker %d is lost; it is being restarted", worker)
            report = await self._restarted(worker)
            if report is None:
                return
            self.reports[worker] = report
            if self.router is not None:
                await asyncio.to_thread(self.router.moved, worker, address_of(report))
            self._health.mark_up(worker)
            logger.warning("worker %d serves again", worker)
        finally:
            with self._lock:
                self._under_way.discard(worker)

    async def _restarted(self, worker: int) -> WorkerReport | None:
        leader = self._leaders[worker]
        told = False
        while not self._closed:
            try:
                if self._owner:
                    weights = self.weights
                    report: WorkerReport = await leader.start.remote(self._devices[worker], weights)
                    # An update that came meanwhile has not reached it: once more.
                    if self.weights is not weights:
                        continue
                else:
                    report = await leader.report.remote()
                return report
            except (ray.exceptions.RayActorError, WorkerNotReadyError):
                pass
            except ray.exceptions.RayError as error:
                if not told:
                    told = True
                    logger.error("worker %d does not start again; it is tried on: %s", worker, error)
            await asyncio.sleep(RETRY_S)
        return None


def address_of(report: WorkerReport) -> WorkerAddress:
    """Where a router listens to this worker."""
    return WorkerAddress(report.node_ip, report.kv_events_port, report.metrics_port)
