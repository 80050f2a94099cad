"""The faults: each is a coroutine that inflicts, waits, and heals.

What heals in its own time (a worker that starts) is waited for, so that a fault is over when its coroutine is.
"""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from chaos.clock import SteppedClock
from chaos.fleet import WorkerPlace
from chaos.proxies import MessageFaults
from chaos.routers import GatewayRouter, LocalRouter


class Signalled(Protocol):
    """A process, or several."""

    def send(self, number: signal.Signals) -> None:
        """Sends a signal."""


class Fleet(Protocol):
    """Workers that can be killed and started."""

    places: list[WorkerPlace]
    clocks: list[SteppedClock]
    """Of the workers; none where they cannot be stepped."""
    block_size: int
    model: str

    async def start(self, number: int) -> None:
        """Starts it on its ports; returns when it serves."""

    async def kill(self, number: int) -> None:
        """SIGKILL."""

    def process(self, number: int) -> Signalled:
        """To send signals to."""


@dataclass
class Scene:
    """What faults are inflicted on."""

    fleet: Fleet
    gateway: GatewayRouter
    local: LocalRouter | None
    rng: random.Random

    def duration(self, shortest: float, longest: float) -> float:
        """Seconds that a fault lasts."""
        return self.rng.uniform(shortest, longest)


Inflict = Callable[[Scene, WorkerPlace, float], Awaitable[None]]


@dataclass(frozen=True)
class Fault:
    """A kind of fault: how, for how long (shortest and longest, seconds), and how often beside the others."""

    name: str
    inflict: Inflict
    lasts: tuple[float, float]
    weight: float


async def killed(scene: Scene, place: WorkerPlace, seconds: float) -> None:
    """kill -9; another worker takes its ports, with an empty cache and other names for its blocks."""
    await scene.fleet.kill(place.number)
    place.cut()
    await asyncio.sleep(seconds)
    await scene.fleet.start(place.number)
    await place.listen()


async def ports_reused(scene: Scene, place: WorkerPlace, seconds: float) -> None:
    """kill -9; something that is no worker takes its ports meanwhile and answers with garbage."""
    await scene.fleet.kill(place.number)
    for link in place.links.values():
        link.garbage = True
        link.reset()
    try:
        await asyncio.sleep(seconds)
    finally:
        for link in place.links.values():
            link.garbage = False
    await scene.fleet.start(place.number)


async def stopped(scene: Scene, place: WorkerPlace, seconds: float) -> None:
    """SIGSTOP for seconds: its connections stay open and nothing answers."""
    process = scene.fleet.process(place.number)
    process.send(signal.SIGSTOP)
    try:
        await asyncio.sleep(seconds)
    finally:
        process.send(signal.SIGCONT)


async def cut(scene: Scene, place: WorkerPlace, seconds: float) -> None:
    """Connections are reset and refused; the worker lives, and works on what it had."""
    place.cut()
    await asyncio.sleep(seconds)
    await place.listen()


async def events_cut(scene: Scene, place: WorkerPlace, seconds: float) -> None:
    """Only the KV events' connection is cut: requests go on, and what they store is not heard of."""
    place.links["kv_events"].cut()
    await asyncio.sleep(seconds)
    await place.links["kv_events"].listen()


async def held(scene: Scene, place: WorkerPlace, seconds: float) -> None:
    """The network passes nothing for seconds, then all that TCP has kept."""
    for link in place.links.values():
        link.hold()
    try:
        await asyncio.sleep(seconds)
    finally:
        for link in place.links.values():
            link.release()


async def half_open(scene: Scene, place: WorkerPlace, seconds: float) -> None:
    """The network passes nothing for seconds, and then the connections turn out to be dead."""
    for link in place.links.values():
        link.hold()
    try:
        await asyncio.sleep(seconds)
    finally:
        for link in place.links.values():
            link.reset()
            link.release()


async def delayed(scene: Scene, place: WorkerPlace, seconds: float) -> None:
    """Everything takes 20 to 150 ms longer each way."""
    delay = scene.rng.uniform(0.02, 0.15)
    for link in place.links.values():
        link.delay_s = delay
    try:
        await asyncio.sleep(seconds)
    finally:
        for link in place.links.values():
            link.delay_s = 0.0


def _messages(faults: Callable[[random.Random], MessageFaults], what: str) -> Inflict:
    async def inflict(scene: Scene, place: WorkerPlace, seconds: float) -> None:
        link = place.links["kv_events"]
        link.faults = faults(scene.rng)
        try:
            await asyncio.sleep(seconds)
        finally:
            link.faults = MessageFaults()

    inflict.__doc__ = what
    return inflict


async def clock_stepped(scene: Scene, place: WorkerPlace, seconds: float) -> None:
    """The wall clock of a worker, and that of the gateway, jump by up to an hour, and back."""
    clocks = [*scene.fleet.clocks[place.number : place.number + 1], scene.gateway.clock]
    for clock in clocks:
        clock.step_to(scene.rng.randrange(-3600, 3601))
    try:
        await asyncio.sleep(seconds)
    finally:
        for clock in clocks:
            clock.step_to(0)


async def gateway_killed(scene: Scene, place: WorkerPlace, seconds: float) -> None:
    """kill -9 of the gateway; the next one knows nothing, and workers have long been publishing."""
    async with scene.gateway.lock:
        await scene.gateway.kill()
        await asyncio.sleep(seconds)
        await scene.gateway.start()


async def local_restarted(scene: Scene, place: WorkerPlace, seconds: float) -> None:
    """The client's own router is closed and made anew."""
    if scene.local is None:
        return
    async with scene.local.lock:
        await scene.local.kill()
        await asyncio.sleep(seconds)
        await scene.local.start()


WORKER_FAULTS = [
    Fault("killed", killed, (0.1, 1.5), 2.0),
    Fault("ports_reused", ports_reused, (0.2, 1.0), 1.0),
    Fault("stopped", stopped, (0.5, 3.0), 2.0),
    Fault("cut", cut, (0.1, 1.5), 2.0),
    Fault("events_cut", events_cut, (0.1, 1.5), 2.0),
    Fault("held", held, (0.2, 3.0), 1.5),
    Fault("half_open", half_open, (0.5, 3.0), 1.5),
    Fault("delayed", delayed, (0.5, 2.0), 1.5),
    Fault(
        "events_lost",
        _messages(lambda rng: MessageFaults(lost=rng.uniform(0.1, 0.6)), "A share of the event messages is lost."),
        (0.3, 2.0),
        2.0,
    ),
    Fault("event_lost", _messages(lambda _: MessageFaults(lose_next=1), "One event message is lost."), (0.5, 1.0), 2.0),
    Fault("events_doubled", _messages(lambda _: MessageFaults(doubled=0.3), "Some come twice."), (0.3, 2.0), 1.0),
    Fault("events_swapped", _messages(lambda _: MessageFaults(swapped=0.3), "Some change places."), (0.3, 2.0), 1.0),
    Fault("clock_stepped", clock_stepped, (0.3, 2.0), 1.0),
]
ROUTER_FAULTS = [
    Fault("gateway_killed", gateway_killed, (0.0, 0.5), 0.4),
    Fault("local_restarted", local_restarted, (0.0, 0.5), 0.4),
]
