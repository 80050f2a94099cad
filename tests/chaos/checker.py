"""Whether the routers believe what the workers hold, block for block."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Protocol

import aiohttp

from chaos.fleet import WorkerPlace


class Truth(Protocol):
    """Knows what a worker holds, by a way that no fault touches."""

    async def held_blocks(self, session: aiohttp.ClientSession, place: WorkerPlace) -> set[int]:
        """The engine's names of its blocks."""


class Believer(Protocol):
    """A router."""

    name: str

    async def held_blocks(self, session: aiohttp.ClientSession, worker: int) -> set[int]:
        """The engine's names of the blocks that it believes the worker to hold."""


class SimTruth:
    """Asks the simulated worker itself."""

    def __init__(self) -> None:
        self.told_removed = 0
        """Blocks held after BlockRemoved was said of their twin (see docs/sim.md), at the last look: not believed in by
        any router, and no mismatch."""

    async def held_blocks(self, session: aiohttp.ClientSession, place: WorkerPlace) -> set[int]:
        """What it holds, as far as it has told."""
        async with session.get(f"{place.direct.url}/debug/blocks") as answer:
            answer.raise_for_status()
            held = await answer.json()
        self.told_removed += len(held["told_removed"])
        return set(held["blocks"])


@dataclass
class Consistency:
    """Of all routers with all workers."""

    held: int = 0
    wrong: int = 0
    """Believed in and not held."""
    missing: int = 0
    """Held and not believed in."""
    where: list[str] = field(default_factory=list)
    """The same by router and worker."""

    @property
    def mismatched(self) -> int:
        """Blocks in which a router and a worker differ."""
        return self.wrong + self.missing


class Checker:
    """Compares every router with every worker."""

    def __init__(self, places: list[WorkerPlace], truth: Truth, believers: list[Believer]) -> None:
        self._places = places
        self._truth = truth
        self._believers = believers

    async def look(self, session: aiohttp.ClientSession) -> Consistency:
        """Compares now.  Means something only while no request runs."""
        found = Consistency()
        held = await asyncio.gather(*(self._truth.held_blocks(session, place) for place in self._places))
        for believer in self._believers:
            believed = await asyncio.gather(*(believer.held_blocks(session, place.number) for place in self._places))
            for place, truth, belief in zip(self._places, held, believed, strict=True):
                found.held += len(truth)
                wrong, missing = len(belief - truth), len(truth - belief)
                found.wrong += wrong
                found.missing += missing
                if wrong or missing:
                    found.where.append(f"{believer.name}, worker {place.number}: {wrong} wrong, {missing} missing")
        return found

    async def wait_consistent(self, since: float, timeout_s: float) -> tuple[Consistency, float]:
        """Looks until there is no mismatch: the last look, and seconds from ``since`` until it began."""
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as session:
            while True:
                began = time.monotonic()
                found = await self.look(session)
                if found.mismatched == 0 or began - since > timeout_s:
                    return found, began - since
                await asyncio.sleep(0.05)
