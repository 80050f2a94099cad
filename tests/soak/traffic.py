"""Who uses a service in a soak: clients with conversations, clients that break off, operators, workers that change."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvrouter.sim import SimWorker

BLOCK_SIZE = 16
LOAD_PORT_OFFSET = 100
MAX_TOKENS = 900


class Conversation:
    """A prompt that grows with each answer, and begins anew when it is long; forty beginnings are shared by all."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._tokens: list[int] = []

    def prompt(self) -> list[int]:
        """The tokens to send next."""
        if not self._tokens or len(self._tokens) > MAX_TOKENS - 100:
            opening = random.Random(self._random.randrange(40))
            self._tokens = [opening.randrange(1000) for _ in range(128)]
        return self._tokens

    def answered(self, tokens: Sequence[int]) -> None:
        """Goes on from an answer with a question of some more tokens."""
        self._tokens = [*self._tokens, *tokens, *(self._random.randrange(1000) for _ in range(24))]


@dataclass
class Tally:
    """What happened, counted by all threads."""

    counts: Counter[str] = field(default_factory=Counter)
    latencies: list[tuple[float, float]] = field(default_factory=list)
    """(when, how long) of each answer that was read to its end, in seconds."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, what: str) -> None:
        """Counts one."""
        with self.lock:
            self.counts[what] += 1

    def timed(self, began: float) -> None:
        """An answer that was asked for at ``began``."""
        now = time.monotonic()
        with self.lock:
            self.latencies.append((now, now - began))


def ask(port: int, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
    """(status, body) of one request on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, None if body is None else json.dumps(body))
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def converse(port: int, tally: Tally, seed: int) -> Callable[[], None]:
    """A client with one conversation and, most of the time, one connection; every other answer is streamed."""
    conversation, turn = Conversation(seed), 0
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)

    def step() -> None:
        nonlocal turn
        turn += 1
        stream = turn % 2 == 0
        body = {
            "prompt": conversation.prompt(),
            "max_tokens": 8,
            "ignore_eos": True,
            "stream": stream,
            "return_token_ids": True,
        }
        began = time.monotonic()
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            data = answer.read()
        except (OSError, http.client.HTTPException):
            connection.close()
            tally.add("cut")  # a worker that went in the middle of a stream cuts it
            return
        if answer.status != 200:
            tally.add(f"status_{answer.status}")
            return
        if stream and not data.rstrip().endswith(b"[DONE]"):
            tally.add("cut")
            return
        tally.add("streamed" if stream else "answered")
        tally.timed(began)
        conversation.answered([1] * 8)
        if turn % 50 == 0:
            connection.close()
        time.sleep(0.01)

    return step


def break_off(port: int, tally: Tally, seed: int) -> Callable[[], None]:
    """A client that is broken in one of several ways each time."""
    chance = random.Random(seed)
    stream = json.dumps({"prompt": [1, 2, 3], "max_tokens": 64, "ignore_eos": True, "stream": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(stream)
    ways: list[bytes] = [
        head + stream,  # gone before the answer is read
        head + stream[:10],
        head[:30],
        b"",
        chance.randbytes(200),
        b"GET / HTTP/1.1\r\nX: " + b"y" * 20_000,
        head + b"[" * len(stream),
        b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n",
    ]

    def step() -> None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as client:
            client.sendall(chance.choice(ways))
            if chance.random() < 0.5:
                client.recv(100)
            if chance.random() < 0.3:  # an abrupt end: the server's next write fails
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        tally.add("broken_clients")
        time.sleep(0.05)

    return step


def operate(port: int, tally: Tally, stable: Sequence[SimWorker]) -> Callable[[], None]:
    """Looks at everything, asks for decisions, and now and then does what a refit does."""
    turn = 0
    request = {"local_hashes": list(range(40)), "num_tokens": 640}

    def step() -> None:
        nonlocal turn
        turn += 1
        for path in ("/metrics", "/workers", "/dashboard.json", "/", "/v1/models"):
            ask(port, "GET", path)
        ask(port, "POST", "/find_best_worker", request)
        ask(port, "POST", "/find_best_workers", {"requests": [request] * 16})
        ask(port, "POST", "/route", {"tokens": list(range(500))})
        ask(port, "POST", "/route", {"prompt": f"a text that nobody has sent yet: {turn}"})
        if turn % 15 == 0:
            ask(port, "POST", "/reset", {"until_cleared": True})
            for worker in stable:
                ask(worker.port, "POST", "/reset_prefix_cache?reset_running_requests=true")
            tally.add("refits")
        tally.add("looks")
        time.sleep(0.25)

    return step


def change_workers(port: int, tally: Tally, make: Callable[[], SimWorker]) -> Callable[[], None]:
    """Adds a worker, and takes it away again: every other time it dies first."""
    turn = 0

    def step() -> None:
        nonlocal turn
        turn += 1
        with make() as worker:
            body = {
                "url": f"http://127.0.0.1:{worker.port}",
                "kv_events": worker.kv_events_endpoint,
                "load": worker.load_endpoint,
            }
            status, answer = ask(port, "POST", "/workers", body)
            if status != 201:
                raise RuntimeError(f"a worker could not be added: {status} {answer!r}")
            added = json.loads(answer)["worker_id"]
            time.sleep(1.5)
            if turn % 2:
                ask(port, "DELETE", f"/workers/{added}")
        if turn % 2 == 0:
            ask(port, "DELETE", f"/workers/{added}")
        tally.add("worker_changes")
        time.sleep(0.5)

    return step


class Traffic:
    """Steps that are repeated in threads until it ends; an exception in one of them ends the soak."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self.errors: list[str] = []

    def start(self, step: Callable[[], None]) -> None:
        """One more thread."""
        self._threads.append(threading.Thread(target=self._run, args=(step,), daemon=True))
        self._threads[-1].start()

    def _run(self, step: Callable[[], None]) -> None:
        while not self._stop.is_set():
            try:
                step()
            except Exception as error:
                self.errors.append(f"{type(error).__name__}: {error}")
                return

    def end(self) -> None:
        """Waits for the steps under way."""
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
