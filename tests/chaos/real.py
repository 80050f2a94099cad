"""Real vLLM workers under test."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import msgpack
import zmq

from chaos.clock import SteppedClock
from chaos.fleet import CHANNELS, Endpoints, WorkerPlace, free_ports
from kvrouter.vllm.launcher import Worker, WorkerFleet, launch_workers
from kvrouter.vllm.tiny_model import make_tiny_model

BLOCK_SIZE = 64
_NUM_BLOCKS = 160  # a few conversations' worth, so that blocks are evicted


class ProcessGroup:
    """A worker's processes, which live in a session of their own."""

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def send(self, number: signal.Signals) -> None:
        """To all of them."""
        os.killpg(self._pid, number)


class VllmFleet:
    """As SimFleet, on vLLM servers."""

    def __init__(self, count: int, folder: Path, rng: random.Random) -> None:
        self._fleet: WorkerFleet = launch_workers(
            count,
            engine="vllm",
            model=make_tiny_model(folder / "model", num_layers=2),
            block_size=BLOCK_SIZE,
            num_gpu_blocks=_NUM_BLOCKS,
            max_model_len=2048,
            log_dir=folder,
            progress=False,
        )
        self.model = self._fleet.model
        self.block_size = BLOCK_SIZE
        self.clocks: list[SteppedClock] = []
        self.on_kill: Callable[[int], None] = lambda _: None
        ports = free_ports(len(CHANNELS) * count)
        self.places = [
            WorkerPlace(w.index, _direct(w), Endpoints(ports[len(CHANNELS) * w.index :][: len(CHANNELS)]), rng)
            for w in self._fleet.workers
        ]

    async def start(self, number: int) -> None:
        """Starts a worker on its ports and waits until it serves."""
        await asyncio.to_thread(self._fleet.restart, number)

    async def kill(self, number: int) -> None:
        """SIGKILL, its children too."""
        await asyncio.to_thread(self._fleet.kill, number)
        self.on_kill(number)

    def process(self, number: int) -> ProcessGroup:
        """To send signals to."""
        return ProcessGroup(self._fleet.workers[number].pid)

    async def close(self) -> None:
        """Ends all."""
        await asyncio.to_thread(self._fleet.stop)


def _direct(worker: Worker) -> Endpoints:
    addresses = (worker.url, worker.kv_events_endpoint, worker.replay_endpoint, worker.load_endpoint)
    return Endpoints([int(address.rpartition(":")[2]) for address in addresses])


class EventTruth:
    """What vLLM workers hold, from their KV events: heard on connections of its own, which no fault touches.

    Raises RuntimeError from ``held_blocks`` when it has missed a batch: then there is no truth to compare with.
    """

    def __init__(self, places: list[WorkerPlace]) -> None:
        self._held: list[set[Any]] = [set() for _ in places]
        self._next = [0] * len(places)
        self._missed: list[str] = []
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._sockets = []
        for place in places:
            socket = self._context.socket(zmq.SUB)
            socket.setsockopt(zmq.SUBSCRIBE, b"")
            socket.setsockopt(zmq.RCVHWM, 0)
            socket.connect(place.direct.kv_events)
            self._sockets.append(socket)
        self._thread = threading.Thread(target=self._listen, name="chaos-truth", daemon=True)
        self._thread.start()

    async def held_blocks(self, session: aiohttp.ClientSession, place: WorkerPlace) -> set[int]:
        """What its events say."""
        del session
        with self._lock:
            if self._missed:
                raise RuntimeError(self._missed[0])
            return set(self._held[place.number])

    def close(self) -> None:
        """Listens no more."""
        self._stopping.set()
        self._thread.join()
        self._context.destroy(linger=0)

    def _listen(self) -> None:
        poller = zmq.Poller()
        for socket in self._sockets:
            poller.register(socket, zmq.POLLIN)
        while not self._stopping.is_set():
            ready = dict(poller.poll(100))
            for number, socket in enumerate(self._sockets):
                if socket in ready:
                    _, sequence, payload = socket.recv_multipart()
                    self._apply(number, int.from_bytes(sequence, "big"), msgpack.unpackb(payload)[1])

    def _apply(self, number: int, sequence: int, events: list[dict[str, Any]]) -> None:
        with self._lock:
            held = self._held[number]
            if sequence == 0:
                held.clear()
            elif sequence != self._next[number]:
                self._missed.append(f"batches {self._next[number]} to {sequence - 1} of worker {number} were missed")
            self._next[number] = sequence + 1
            for event in events:
                if event["type"] == "BlockStored":
                    held.update(event["block_hashes"])
                elif event["type"] == "BlockRemoved":
                    held.difference_update(event["block_hashes"])
                elif event["type"] == "AllBlocksCleared":
                    held.clear()

    def forget(self, number: int) -> None:
        """The worker is dead: it holds nothing, and its successor will count from 0."""
        with self._lock:
            self._held[number].clear()
            self._next[number] = 0
