"""The way to the fleet's one router, from whatever process: what travels when a generation object is pickled."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from kvrouter import compute_block_hashes
from kvrouter.api import RouterAPI
from kvrouter.config import RouterConfig, WorkerAddress, routing_policy
from kvrouter.ray import background
from kvrouter.ray.http_json import HttpJson

logger = logging.getLogger("kvrouter.ray")

CONNECT_S = 5.0
ANSWER_TIMEOUT_S = 5.0
#: After a failure the router is not asked for so long.
COOL_DOWN_S = 1.0


@dataclass(frozen=True, slots=True)
class Choice:
    """The worker of one request.

    overlap_blocks: leading blocks of it that the worker is believed to hold; None: unknown.
    ticket: for ``RouterHandle.complete``; 0: the router keeps no account of it, or not for this process.
    """

    worker: int
    overlap_blocks: int | None
    ticket: int = 0


class RouterHandle:
    """Asks the router: a function call in the process that started it, HTTP (C++ serves it) from any other.

    Why so: docs/decisions/0004-ray-router-in-the-owner.md.  Picklable; a copy is a handle that knows the URL.
    """

    def __init__(self, url: str, block_size: int, num_workers: int) -> None:
        self.url = url
        self.block_size = block_size
        self.num_workers = num_workers
        self._api: RouterAPI | None = None
        self._http: HttpJson | None = None
        self._config: RouterConfig | None = None
        self._addresses: list[WorkerAddress] = []
        self._enable_kv_indexer = True
        self._silent_until = 0.0
        self._told = False

    @classmethod
    def start(
        cls, config: RouterConfig, addresses: Sequence[WorkerAddress], enable_kv_indexer: bool = True
    ) -> RouterHandle:
        """Starts the router in this process, listening to workers at these addresses.

        Raises ValueError, RuntimeError or OSError, naming the setting, when it cannot.
        """
        handle = cls("", config["block_size"], len(addresses))
        handle._config = config
        handle._addresses = list(addresses)
        handle._enable_kv_indexer = enable_kv_indexer
        handle._listen(port=0)
        return handle

    def _listen(self, port: int) -> None:
        config, addresses = self._config, self._addresses
        assert config is not None
        host = host_to_serve_on()
        api = RouterAPI(
            config["block_size"],
            len(addresses),
            config["base_kv_events_port"],
            config["base_metrics_port"],
            port,
            host=host,
            worker_addresses=[address.host for address in addresses],
            worker_ports=[address.kv_events_port for address in addresses],
            policy=routing_policy(config),
            index_memory_limit=config.get("index_memory_limit", 0),
            replay=config.get("replay", False),
        )
        api.router.start(self._enable_kv_indexer)
        if not api.router.wait_until_connected(CONNECT_S):
            logger.warning("not every worker's publishers were reached within %.0f s: see router.status()", CONNECT_S)
        api.serve()
        self._api = api
        self.url = f"http://{host}:{api.port}"

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "block_size": self.block_size, "num_workers": self.num_workers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    # --- decisions; None when the router does not answer ---

    async def choose(self, prompts: Sequence[npt.NDArray[np.int64]]) -> list[Choice] | None:
        """A worker for each prompt (its token ids), all decided together."""
        if not prompts:
            return []
        if self._api is not None:
            return self._decided(lambda api: api.router.dispatch_batch(list(prompts)))
        hashes = [compute_block_hashes(tokens, self.block_size) for tokens in prompts]
        return await self.choose_hashed(hashes, [len(tokens) for tokens in prompts])

    async def choose_hashed(
        self, hashes: Sequence[npt.NDArray[np.uint64]], num_tokens: Sequence[int]
    ) -> list[Choice] | None:
        """The same for prompts given by their block hashes and lengths."""
        if self._api is not None:
            return self._decided(lambda api: api.router.dispatch_batch(hashes=hashes, num_tokens=list(num_tokens)))
        requests = [
            {"local_hashes": of_request.tolist(), "num_tokens": length}
            for of_request, length in zip(hashes, num_tokens, strict=True)
        ]
        answer = await self._ask("/find_best_workers", {"requests": requests})
        if answer is None:
            return None
        return _choices(answer["worker_ids"], answer["overlap_blocks"], [0] * len(requests))

    async def round_robin(self) -> Choice | None:
        """The next worker in turn; nothing is predicted."""
        if self._api is not None:
            return Choice(self._api.router.worker_round_robin(), None)
        answer = await self._ask("/find_worker_round_robin", {"local_hashes": [], "num_tokens": 1})
        return None if answer is None else Choice(answer["worker_id"], None)

    def _decided(self, decide: Any) -> list[Choice] | None:
        try:
            workers, overlaps, tickets = decide(self._api)
        except Exception as error:  # whatever fails in a decision, the requests still get a worker
            self._say_failed(error)
            return None
        return _choices(workers.tolist(), overlaps.tolist(), tickets.tolist())

    async def _ask(self, path: str, body: Any) -> Any:
        if time.monotonic() < self._silent_until:
            return None
        if self._http is None:
            self._http = HttpJson(self.url, ANSWER_TIMEOUT_S)
        try:
            # The connection belongs to the background loop: the caller's may end with this rollout.
            answer = await asyncio.wrap_future(background.spawn(self._http.post(path, body)))
        except Exception as error:
            self._silent_until = time.monotonic() + COOL_DOWN_S
            self._say_failed(error)
            return None
        if self._told:
            self._told = False
            logger.warning("the router answers again")
        return answer

    def _say_failed(self, error: Exception) -> None:
        if not self._told:
            self._told = True
            logger.warning("the router does not answer (%s): requests go round robin until it does", error)

    # --- what it is told ---

    def complete(self, choice: Choice, output_tokens: int | None = None, first_token_s: float | None = None) -> None:
        """A request is finished, or given up; see ``KvRouter.complete``.

        Does nothing for choices without a ticket, and in processes other than the router's: what those send is
        corrected by the workers' load messages.
        """
        if self._api is not None and choice.ticket:
            self._api.router.complete(choice.ticket, output_tokens, first_token_s)

    def report_hit(self, choice: Choice, tokens: npt.NDArray[np.int64], cached_tokens: int) -> None:
        """What the chosen worker took from its cache of a prompt (its token ids); see ``KvRouter.report_hit``.

        Does nothing for choices that predicted nothing, and in processes other than the router's.
        """
        if self._api is not None and choice.overlap_blocks is not None:
            hashes = compute_block_hashes(tokens, self.block_size)
            self._api.router.report_hit(choice.worker, choice.overlap_blocks, len(tokens), cached_tokens, hashes=hashes)

    async def reset(self, worker: int | None = None, until_cleared: bool = False) -> None:
        """A worker, or all, have emptied their caches, or are about to: see ``KvRouter.reset``."""
        if self._api is not None:
            self._api.router.reset(worker, until_cleared)
        else:
            await self._ask("/reset", {"worker_id": worker, "until_cleared": until_cleared})

    def moved(self, worker: int, address: WorkerAddress) -> None:
        """A worker that was gone is back; in the process that started the router."""
        api = self._api
        if api is None:
            return
        api.router.reset(worker)
        if self._addresses[worker] == address:
            # It is sent nothing before it is heard: the events of its first requests would be lost.
            api.router.wait_until_connected(CONNECT_S, worker)
            return
        logger.warning(
            "worker %d is back at another address (%s:%d): the router starts with an empty index",
            worker,
            address.host,
            address.kv_events_port,
        )
        self._addresses[worker] = address
        api.close()
        self._listen(api.port)

    # --- what others want to know ---

    @property
    def is_here(self) -> bool:
        """Whether the router runs in this process."""
        return self._api is not None

    def status(self) -> dict[str, Any]:
        """What the router knows of each worker, and of itself; see ``KvRouter.status``."""
        if self._api is not None:
            return self._api.router.status()
        if self._http is None:
            self._http = HttpJson(self.url, ANSWER_TIMEOUT_S)
        status: dict[str, Any] = background.run(self._http.get("/workers"))
        return status

    def close(self) -> None:
        """Ends the router, if it runs in this process; a second call does nothing."""
        api, self._api = self._api, None
        if api is not None:
            api.close()


def _choices(workers: Sequence[int], overlaps: Sequence[int], tickets: Sequence[int]) -> list[Choice]:
    return [Choice(int(w), int(overlap), int(t)) for w, overlap, t in zip(workers, overlaps, tickets, strict=True)]


def host_to_serve_on() -> str:
    """Loopback while all of Ray is on one host, as there is no authentication; else this node's address."""
    hosts = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    return "127.0.0.1" if len(hosts) == 1 else str(ray.util.get_node_ip_address())
