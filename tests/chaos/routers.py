"""The routers under test: ``kvrouter serve`` as a process, and a ``KvRouter`` in this one."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import aiohttp

from chaos.clock import SteppedClock
from chaos.fleet import Endpoints, free_ports, wait_healthy
from chaos.processes import Process
from kvrouter import KvRouter


class GatewayRouter:
    """``kvrouter serve``, which can be killed."""

    name = "gateway"

    def __init__(self, endpoints: list[Endpoints], block_size: int, folder: Path, shim: Path) -> None:
        port = free_ports(1)[0]
        self.url = f"http://127.0.0.1:{port}"
        self.clock = SteppedClock(shim, folder / "clock-gateway")
        self.lock = asyncio.Lock()
        self.kills = 0
        self.down = True
        command = [sys.executable, "-m", "kvrouter.cli", "serve", "--port", str(port), "--block-size", str(block_size)]
        for one in endpoints:
            command += ["--worker", one.spec]
        command += ["--max-workers", str(len(endpoints)), "--first-byte-timeout", "20", "--stream-timeout", "20"]
        self._process = Process(command, folder / "gateway.log", self.clock.environment)

    async def start(self) -> None:
        """Starts it; returns when it serves."""
        self._process.start()
        await wait_healthy(self.url, lambda: self._process.alive)
        self.down = False

    async def kill(self) -> None:
        """SIGKILL."""
        self.kills += 1
        self.down = True
        await self._process.kill()

    async def held_blocks(self, session: aiohttp.ClientSession, worker: int) -> set[int]:
        """The engine's names of the blocks that it believes a worker to hold."""
        async with session.get(f"{self.url}/workers/{worker}/blocks") as answer:
            answer.raise_for_status()
            return set((await answer.json())["blocks"])


class LocalRouter:
    """A ``KvRouter`` that a client has in its own process."""

    name = "local"

    def __init__(self, endpoints: list[Endpoints], block_size: int) -> None:
        self._endpoints = endpoints
        self._block_size = block_size
        self.lock = asyncio.Lock()
        self.router = self._new()

    def _new(self) -> KvRouter:
        one = self._endpoints[0].ports
        return KvRouter(
            block_size=self._block_size,
            num_workers=len(self._endpoints),
            base_kv_events_port=one["kv_events"],
            base_metrics_port=one["load"],
            worker_addresses=["127.0.0.1"] * len(self._endpoints),
            worker_ports=[each.ports["kv_events"] for each in self._endpoints],
            replay=[each.replay for each in self._endpoints],
            seed=1,
        )

    async def start(self) -> None:
        """A new one, which knows nothing yet."""
        self.router = self._new()
        self.router.start()

    async def kill(self) -> None:
        """Gives it up with all that it knows."""
        await asyncio.to_thread(self.router.close)

    async def held_blocks(self, session: aiohttp.ClientSession, worker: int) -> set[int]:
        """As the gateway's."""
        del session
        return set(self.router.worker_blocks(worker).tolist())
