"""Which workers of a fleet can be sent requests, as this process knows it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Collection

POLL_S = 0.05


class FleetHealth:
    """Workers that are up, and how many of this process's requests each has.  May be called from any thread."""

    def __init__(self, num_workers: int) -> None:
        self._lock = threading.Lock()
        self._down: set[int] = set()
        self._in_flight = [0] * num_workers
        self._turn = 0

    def is_up(self, worker: int) -> bool:
        """Whether the worker may be sent requests."""
        return worker not in self._down

    def mark_down(self, worker: int) -> bool:
        """The worker was lost; False if that was known."""
        with self._lock:
            known = worker in self._down
            self._down.add(worker)
            return not known

    def mark_up(self, worker: int) -> None:
        """The worker serves again."""
        with self._lock:
            self._down.discard(worker)

    def began(self, worker: int) -> None:
        """A request is on its way."""
        with self._lock:
            self._in_flight[worker] += 1

    def ended(self, worker: int) -> None:
        """It was answered, or failed."""
        with self._lock:
            self._in_flight[worker] -= 1

    def next_in_turn(self) -> int:
        """The next worker that is up, or the next at all when none is."""
        with self._lock:
            count = len(self._in_flight)
            for _ in range(count):
                worker = self._turn % count
                self._turn += 1
                if worker not in self._down:
                    return worker
            return self._turn % count

    def least_loaded(self, but_not: Collection[int] = ()) -> int | None:
        """The worker with the fewest of this process's requests; None when no other is up."""
        with self._lock:
            candidates = [
                (load, worker)
                for worker, load in enumerate(self._in_flight)
                if worker not in self._down and worker not in but_not
            ]
        return min(candidates)[1] if candidates else None

    async def wait_for_any(self, timeout_s: float) -> bool:
        """Waits until a worker is up; False when ``timeout_s`` seconds are over first."""
        deadline = time.monotonic() + timeout_s
        while len(self._down) == len(self._in_flight):
            if time.monotonic() >= deadline:
                return False
            await asyncio.sleep(POLL_S)
        return True
