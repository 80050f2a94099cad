"""A router over servers that come and go under names of their own, as frameworks have them."""

from __future__ import annotations

import secrets
import weakref
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from kvrouter import _core
from kvrouter.router import Listening


@dataclass(frozen=True)
class Endpoints:
    """Where a server speaks; what is empty is not listened to.

    kv_events, replay, load: ZMQ endpoints.
    http: base URL, whose /metrics is read while there is no load endpoint.
    """

    kv_events: str = ""
    replay: str = ""
    load: str = ""
    http: str = ""


@dataclass(frozen=True)
class Choice:
    """The server for one request.

    overlap_blocks: leading blocks of the prompt that it holds by its KV events.
    overlap_tokens: the same in tokens.
    ticket: for complete().
    """

    server: str
    overlap_blocks: int
    overlap_tokens: int
    ticket: int


class RoutedFleet:
    """Servers by name over the core's numbered workers.  Not safe for threads: frameworks call from one.

    block_size: tokens a KV block; the servers' own.
    policy: one of ``kvrouter.policy_names()``.
    max_servers: most servers at a time.
    index_memory_limit: bytes that the prefix index may take, at least 1 MiB; 0: no limit.
    seed: of the choice between equals; None: a random one.

    Raises ValueError, naming the setting, for values out of range.
    """

    def __init__(
        self,
        block_size: int,
        *,
        policy: str = "adaptive",
        max_servers: int = 64,
        index_memory_limit: int = 0,
        seed: int | None = None,
    ) -> None:
        if isinstance(max_servers, bool) or not isinstance(max_servers, int) or not 1 <= max_servers <= 1024:
            raise ValueError(f"max_servers must be from 1 to 1024, not {max_servers!r}")
        nowhere = [""] * max_servers
        self._core = _core.Router(
            block_size=block_size,
            kv_events=nowhere,
            load=nowhere,
            http=nowhere,
            policy=policy,
            seed=secrets.randbits(64) if seed is None else seed,
            index_memory_limit=index_memory_limit,
        )
        self.block_size = block_size
        self._free = list(range(max_servers - 1, -1, -1))
        self._worker: dict[str, int] = {}
        self._name: dict[int, str] = {}
        self._tickets: dict[str, set[int]] = {}
        self._listening = Listening(self._core)
        weakref.finalize(self, self._listening.stop)
        self._listening.start(True)

    def add(self, server: str, endpoints: Endpoints) -> None:
        """A server that requests may go to from now on; one that is there already is listened to at its new endpoints.

        Raises ValueError for an endpoint that is none and when there are ``max_servers`` already.
        """
        worker = self._worker.get(server)
        if worker is None:
            if not self._free:
                raise ValueError(f"there are {len(self._worker)} servers already: raise max_servers")
            worker = self._free[-1]
        self._core.set_worker(
            worker,
            kv_events=endpoints.kv_events,
            load=endpoints.load,
            http=endpoints.http,
            replay=endpoints.replay,
        )
        if server not in self._worker:
            self._free.pop()
            self._worker[server] = worker
            self._name[worker] = server
            self._tickets[server] = set()

    def remove(self, server: str) -> None:
        """Nothing goes there any more, and what was known of it is forgotten.  A server that is not there: nothing."""
        worker = self._worker.pop(server, None)
        if worker is None:
            return
        for ticket in self._tickets.pop(server):
            self._core.complete(ticket)
        del self._name[worker]
        self._core.set_worker(worker)
        self._free.append(worker)

    def choose(self, tokens: Any, among: Iterable[str] | None = None, *, lora_name: str | None = None) -> Choice:
        """The server for a prompt.

        tokens: list, or 1-D integer array, (num_tokens,), not empty.
        among: servers that may be chosen; None: all.  Names that are not there do not count.
        lora_name: the adapter that the request asks for, if any.
        Raises LookupError when no server is left, ValueError for tokens that are none.
        """
        names: Collection[str] = self._worker if among is None else [name for name in among if name in self._worker]
        if not names:
            raise LookupError("there is no server to choose")
        decision = self._core.explain_among(tokens, [self._worker[name] for name in names], lora_name)
        server = self._name[decision.worker]
        if decision.ticket:
            self._tickets[server].add(decision.ticket)
        overlap = decision.overlap_blocks
        return Choice(server, overlap, min(overlap * self.block_size, decision.num_tokens), decision.ticket)

    def complete(self, choice: Choice, output_tokens: int | None = None) -> None:
        """The request is finished, or given up; a second call does nothing."""
        tickets = self._tickets.get(choice.server)
        if tickets is not None and choice.ticket in tickets:
            tickets.remove(choice.ticket)
            self._core.complete(choice.ticket, -1 if output_tokens is None else output_tokens)

    def cached_blocks(self) -> dict[str, int]:
        """For each server the blocks that it holds as far as is known; for debugging and tests."""
        return {name: len(self._core.index.worker_blocks(worker)) for name, worker in self._worker.items()}

    def __contains__(self, server: object) -> bool:
        return server in self._worker

    def __len__(self) -> int:
        return len(self._worker)

    def close(self) -> None:
        """Stops listening.  A second call does nothing."""
        self._listening.stop()
