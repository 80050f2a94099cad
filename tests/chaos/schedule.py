"""Which fault strikes whom, and when: drawn from a seed, so that a run can be repeated."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Collection

from chaos.faults import ROUTER_FAULTS, WORKER_FAULTS, Fault, Scene
from chaos.fleet import WorkerPlace


class Schedule:
    """Inflicts ``count`` faults, at most ``at_once`` at a time and one at a time on each worker."""

    def __init__(self, scene: Scene, count: int, at_once: int, seed: int, kinds: Collection[str] = ()) -> None:
        self._scene = scene
        self._rng = random.Random(seed)
        self._count = count
        self._slots = asyncio.Semaphore(at_once)
        self._kinds = [fault for fault in WORKER_FAULTS + ROUTER_FAULTS if not kinds or fault.name in kinds]
        if not self._kinds:
            raise ValueError(f"no fault is called so: {', '.join(kinds)}")
        self.inflicted: Counter[str] = Counter()

    async def run(self) -> None:
        """Returns when all are healed.  Raises what a fault raised, e.g. because a worker did not start again."""
        running: set[asyncio.Task[None]] = set()
        try:
            for _ in range(self._count):
                fault = self._rng.choices(self._kinds, [kind.weight for kind in self._kinds])[0]
                place = self._rng.choice(self._scene.fleet.places)
                seconds = self._rng.uniform(*fault.lasts)
                await self._slots.acquire()
                running.add(asyncio.ensure_future(self._inflict(fault, place, seconds)))
                for task in [task for task in running if task.done()]:
                    running.discard(task)
                    task.result()
            await asyncio.gather(*running)
        finally:
            for task in running:
                task.cancel()

    async def _inflict(self, fault: Fault, place: WorkerPlace, seconds: float) -> None:
        try:
            async with place.lock:
                await fault.inflict(self._scene, place, seconds)
                self.inflicted[fault.name] += 1
        finally:
            self._slots.release()
