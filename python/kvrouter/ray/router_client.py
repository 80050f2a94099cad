"""What a process needs to ask the router: the handle that travels when a generation object is pickled."""

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

from kvrouter._core import compute_block_hashes
from kvrouter.config import RouterConfig, WorkerAddress
from kvrouter.ray.router_actor import MAX_CALLS, RouterActor
from kvrouter.ray.router_metrics import Outcome

logger = logging.getLogger("kvrouter.ray")

ANSWER_TIMEOUT_S = 5.0
START_TIMEOUT_S = 60.0
#: After a failure the router is not asked for so long.
COOL_DOWN_S = 1.0

#: What a question to the router fails with.  No request fails with it: they go round robin.
ROUTER_ERRORS = (ray.exceptions.RayError, TimeoutError, asyncio.TimeoutError)


@dataclass(frozen=True, slots=True)
class Choice:
    """The worker of one request, and the leading blocks of it that the worker is believed to hold."""

    worker: int
    overlap_blocks: int | None


class RouterClient:
    """Asks the router's actor.  Picklable; each process has its own view of whether the router answers."""

    def __init__(self, actor: Any, block_size: int, num_workers: int) -> None:
        self.actor = actor
        self.block_size = block_size
        self.num_workers = num_workers
        self._silent_until = 0.0
        self._told = False

    @classmethod
    def start(
        cls, config: RouterConfig, addresses: Sequence[WorkerAddress], enable_kv_indexer: bool = True
    ) -> RouterClient:
        """Starts the actor on this node and waits until it listens.

        Raises ValueError or RuntimeError, naming the setting, when it cannot.
        """
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=True
        )
        actor = (
            ray.remote(RouterActor)
            .options(num_cpus=0, max_restarts=-1, max_concurrency=MAX_CALLS, scheduling_strategy=here)
            .remote(config, len(addresses))
        )
        try:
            ray.get(actor.start.remote(list(addresses), enable_kv_indexer), timeout=START_TIMEOUT_S)
        except ray.exceptions.RayTaskError as error:
            ray.kill(actor)
            raise error.cause from None
        except Exception:
            ray.kill(actor)
            raise
        return cls(actor, config["block_size"], len(addresses))

    def __getstate__(self) -> dict[str, Any]:
        return {"actor": self.actor, "block_size": self.block_size, "num_workers": self.num_workers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    # --- decisions ---

    async def choose(self, prompts: Sequence[npt.NDArray[np.int64]]) -> list[Choice] | None:
        """A worker for each prompt, all decided at once; None when the router does not answer."""
        began = time.perf_counter()
        hashes = [compute_block_hashes(tokens, self.block_size) for tokens in prompts]
        return await self.choose_hashed(hashes, [len(tokens) for tokens in prompts], began)

    async def choose_hashed(
        self, hashes: Sequence[npt.NDArray[np.uint64]], num_tokens: Sequence[int], began: float | None = None
    ) -> list[Choice] | None:
        """The same for prompts given by their block hashes and lengths.

        began: when the caller began, by ``time.perf_counter``, if it was before.
        """
        if not num_tokens:
            return []
        flat = np.concatenate(hashes) if hashes else np.empty(0, np.uint64)
        blocks = [len(of_request) for of_request in hashes]
        began = time.perf_counter() if began is None else began
        answer = await self._ask(self.actor.choose_batch, flat, blocks, list(num_tokens))
        if answer is None:
            return None
        self.actor.record_decisions.remote((time.perf_counter() - began) * 1e6, len(num_tokens))
        return [Choice(worker, overlap) for worker, overlap in zip(*answer, strict=True)]

    async def round_robin(self, count: int) -> list[Choice] | None:
        """The next workers in turn; None when the router does not answer."""
        workers = await self._ask(self.actor.round_robin, count)
        return None if workers is None else [Choice(worker, None) for worker in workers]

    async def _ask(self, method: Any, *args: Any) -> Any:
        if time.monotonic() < self._silent_until:
            return None
        try:
            answer = await asyncio.wait_for(asyncio.wrap_future(method.remote(*args).future()), ANSWER_TIMEOUT_S)
        except ROUTER_ERRORS as error:
            self._silent_until = time.monotonic() + COOL_DOWN_S
            if not self._told:
                self._told = True
                logger.warning("the router does not answer (%s): requests go round robin until it does", error)
            return None
        if self._told:
            self._told = False
            logger.warning("the router answers again")
        return answer

    # --- what it is told; nobody waits for it ---

    def record(self, outcomes: Sequence[Outcome]) -> None:
        """These requests were answered."""
        self.actor.record.remote(list(outcomes))

    def reset(self, worker: int | None = None) -> Any:
        """A worker (None: each) has emptied its cache.  Returns the ObjectRef of the call, to wait for."""
        return self.actor.reset.remote(worker)

    def moved(self, worker: int, address: WorkerAddress) -> Any:
        """A worker that was gone is back.  Returns the ObjectRef of the call."""
        return self.actor.moved.remote(worker, address)
