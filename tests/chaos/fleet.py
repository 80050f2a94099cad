"""The workers under test, each on four fixed ports, and the links through which routers reach them."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from pathlib import Path

import aiohttp

from chaos.clock import SteppedClock
from chaos.processes import Process
from chaos.proxies import Link
from kvrouter.vllm.ports import find_free_ports

BLOCK_SIZE = 16
NUM_BLOCKS = 257
_START_TIMEOUT_S = 60.0
CHANNELS = ("http", "kv_events", "replay", "load")


class Endpoints:
    """The addresses of one worker: its own (``direct``), or those of the links in front of it."""

    def __init__(self, ports: list[int]) -> None:
        self.ports = dict(zip(CHANNELS, ports, strict=True))
        self.url = f"http://127.0.0.1:{self.ports['http']}"
        self.kv_events, self.replay, self.load = (f"tcp://127.0.0.1:{self.ports[name]}" for name in CHANNELS[1:])

    @property
    def spec(self) -> str:
        """As ``kvrouter serve --worker`` takes them."""
        return f"{self.url},kv_events={self.kv_events},replay={self.replay},load={self.load}"


class WorkerPlace:
    """Where a worker runs: its addresses, the links in front, its wall clock; and who does something to it now."""

    def __init__(self, number: int, direct: Endpoints, proxied: Endpoints, rng: random.Random) -> None:
        self.number = number
        self.direct = direct
        self.proxied = proxied
        self.links = {
            name: Link(proxied.ports[name], direct.ports[name], rng, messages=name == "kv_events") for name in CHANNELS
        }
        self.lock = asyncio.Lock()

    async def listen(self) -> None:
        """Its links take connections."""
        for link in self.links.values():
            await link.listen()

    def cut(self) -> None:
        """Its links refuse connections and reset those they have."""
        for link in self.links.values():
            link.cut()


def free_ports(count: int) -> list[int]:
    """Ports that are free, and outside the range of outgoing connections: nobody takes them while they are not used."""
    reserved = find_free_ports(count, "127.0.0.1")
    reserved.release()
    return list(range(reserved.base, reserved.base + count))


def make_places(count: int, rng: random.Random) -> list[WorkerPlace]:
    """Places for ``count`` workers."""
    width = len(CHANNELS)
    ports = free_ports(2 * width * count)
    batches = [ports[first : first + width] for first in range(0, len(ports), width)]
    return [
        WorkerPlace(number, Endpoints(batches[2 * number]), Endpoints(batches[2 * number + 1]), rng)
        for number in range(count)
    ]


def _sim_command(at: Endpoints, replay_buffer: int) -> list[str]:
    command = [sys.executable, "-m", "kvrouter.sim", "--debug"]
    for flag, value in {
        "port": at.ports["http"],
        "kv-events-endpoint": at.kv_events,
        "replay-endpoint": at.replay,
        "load-endpoint": at.load,
        "block-size": BLOCK_SIZE,
        "num-blocks": NUM_BLOCKS,
        "max-model-len": 2048,
        "time-scale": 0.3,
        "replay-buffer": replay_buffer,
    }.items():
        command += [f"--{flag}", str(value)]
    return command


class SimFleet:
    """Simulated workers, one process each."""

    model = "sim"

    def __init__(self, places: list[WorkerPlace], folder: Path, shim: Path, replay_buffer: int = 10_000) -> None:
        self.places = places
        self.block_size = BLOCK_SIZE
        self._starts = 0
        self.clocks = [SteppedClock(shim, folder / f"clock-{place.number}") for place in places]
        self._processes = [
            Process(
                _sim_command(place.direct, replay_buffer),
                folder / f"worker-{place.number}.log",
                clock.environment,
            )
            for place, clock in zip(places, self.clocks, strict=True)
        ]

    async def start(self, number: int) -> None:
        """Starts a worker on its ports and waits until it serves.  Its block names are others than before."""
        self._starts += 1
        process = self._processes[number]
        process.start(["--seed", str(self._starts)])
        await wait_healthy(self.places[number].direct.url, lambda: process.alive)

    async def kill(self, number: int) -> None:
        """SIGKILL."""
        await self._processes[number].kill()

    def process(self, number: int) -> Process:
        """To send signals to."""
        return self._processes[number]

    async def close(self) -> None:
        """Kills all."""
        await asyncio.gather(*(process.kill() for process in self._processes))


async def wait_healthy(url: str, alive: object, timeout_s: float = _START_TIMEOUT_S) -> None:
    """Until ``url``/health answers 200.  Raises RuntimeError when the process is gone or the time is over."""
    deadline = time.monotonic() + timeout_s
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
        while True:
            try:
                async with session.get(f"{url}/health") as answer:
                    if answer.status == 200:
                        return
            except (OSError, aiohttp.ClientError, asyncio.TimeoutError):
                pass
            if callable(alive) and not alive():
                raise RuntimeError(f"what should serve at {url} has ended: see its log")
            if time.monotonic() > deadline:
                raise RuntimeError(f"nothing answers at {url} within {timeout_s:g} s")
            await asyncio.sleep(0.05)
