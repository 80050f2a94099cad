"""RoutedVllmWorkerGroup: workers and the router that knows them, in one object."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import numpy as np

from kvrouter.config import RouterConfig
from kvrouter.ray.batched_data_dict import to_numpy
from kvrouter.ray.config import router_enabled
from kvrouter.ray.dispatch import Answer
from kvrouter.ray.engine.base import SampleRequest
from kvrouter.ray.engine_fleet import EngineFleet
from kvrouter.ray.router_handle import Choice, RouterHandle
from kvrouter.ray.virtual_cluster import RayVirtualCluster
from kvrouter.ray.worker_group import RayWorkerBuilder

DISABLED = "Routing is disabled. Use run_single_worker_single_data() to manually specify worker_id."
NOT_STARTED = "Router not started. Call await start_router() first."


class RoutedVllmWorkerGroup(EngineFleet):
    """Engines in Ray actors, and one router that every holder of this object asks.

    Picklable: a copy in another process asks the same workers and the same router, which runs in the process that made
    the group.

    router_config: the router's settings; None or ``enabled: False``: no routing.
    For the rest see ``EngineFleet`` and ``RayWorkerGroup``.  Engines are started here, which takes as long as the
    slowest takes; the router by ``start_router``.
    """

    def __init__(
        self,
        cluster: RayVirtualCluster,
        remote_worker_builder: RayWorkerBuilder,
        router_config: RouterConfig | None = None,
        workers_per_node: int | Sequence[int] | None = None,
        name_prefix: str = "vllm_routed",
        bundle_indices_list: Sequence[tuple[int, Sequence[int]]] | None = None,
        env_vars: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(
            cluster, remote_worker_builder, router_config, workers_per_node, name_prefix, bundle_indices_list, env_vars
        )

    # --- the router ---

    @property
    def router(self) -> RouterHandle | None:
        """The way to the router; None while there is none."""
        return self._router

    @property
    def router_enabled(self) -> bool:
        """Whether a router is asked for."""
        return router_enabled(self.router_config)

    async def start_router(self, enable_kv_indexer: bool = True) -> None:
        """Starts the router; nothing if it runs.

        enable_kv_indexer: False to know loads only.
        Raises RuntimeError when routing is disabled, ValueError, RuntimeError or OSError when the router cannot start.
        """
        await asyncio.to_thread(self.start_router_now, enable_kv_indexer)

    def start_router_now(self, enable_kv_indexer: bool = True) -> None:
        """``start_router`` for callers without a loop."""
        config = self.router_config
        if config is None or not self.router_enabled:
            raise RuntimeError("Cannot start router when routing is disabled. Set router_config.enabled=True.")
        if self._router is not None:
            return
        self._check_owner("start the router")
        for report in self._recovery.reports.values():
            if report.block_size != config["block_size"]:
                raise ValueError(
                    f"router block_size {config['block_size']} is not worker {report.rank}'s {report.block_size}: set "
                    "router_cfg.block_size to it"
                )
        self._router = RouterHandle.start(config, self.worker_addresses(), enable_kv_indexer)
        self._recovery.router = self._router

    async def stop_router(self) -> None:
        """Ends the router; requests go round robin.  A second call does nothing.

        In a process that has a copy of the group, that process asks the router no more.
        """
        await asyncio.to_thread(self._close_router)

    def _started_router(self) -> RouterHandle:
        if not self.router_enabled:
            raise RuntimeError(DISABLED)
        if self._router is None:
            raise RuntimeError(NOT_STARTED)
        return self._router

    # --- decisions ---

    async def get_best_worker_id(self, token_ids: Any, num_tokens: int | None = None) -> int:
        """The worker for a request.

        token_ids: of its prompt, a list, array or tensor; or, with ``num_tokens`` (the prompt's length), the hashes of
            its full blocks (``compute_block_hashes``).
        Raises RuntimeError when routing is disabled or not started.  When the router does not answer: round robin.
        """
        batch_tokens = None if num_tokens is None else [num_tokens]
        return (await self.get_best_worker_ids_batch([token_ids], batch_tokens))[0]

    async def get_best_worker_ids_batch(
        self, batch_hashes: Sequence[Any], batch_num_tokens: Sequence[int] | None = None
    ) -> list[int]:
        """The workers for a batch of requests, in its order, decided together: each knows where the others go.

        batch_hashes: of each request its token ids, or its block hashes with its length in ``batch_num_tokens``.
            An entry as long as its number of tokens is token ids (of blocks it would have fewer).
        Raises ValueError for two lists of unequal length; else as ``get_best_worker_id``.
        """
        router = self._started_router()
        entries = [to_numpy(entry) for entry in batch_hashes]
        lengths = [len(entry) for entry in entries] if batch_num_tokens is None else [int(n) for n in batch_num_tokens]
        if len(entries) != len(lengths):
            raise ValueError(f"{len(entries)} lists of hashes for {len(lengths)} numbers of tokens")
        if any(length < 1 for length in lengths):
            raise ValueError("num_tokens must be positive")
        if all(len(entry) == length for entry, length in zip(entries, lengths, strict=True)) and self.block_size > 1:
            choices = await router.choose(entries)
        else:
            choices = await router.choose_hashed([entry.astype(np.uint64) for entry in entries], lengths)
        if choices is None:
            return [self._health.next_in_turn() for _ in lengths]
        return [self._serving(choice.worker) for choice in choices]

    async def get_worker_round_robin(self, local_hashes: Any = None, num_tokens: int | None = None) -> int:
        """The next worker in turn; the arguments do not matter."""
        choice = await self._started_router().round_robin()
        return self._health.next_in_turn() if choice is None else self._serving(choice.worker)

    def _serving(self, worker: int) -> int:
        """The worker, or another while this process knows it to be lost and the router does not yet."""
        return worker if self._health.is_up(worker) else self._health.next_in_turn()

    async def choose(self, requests: Sequence[SampleRequest], use_router: bool = True) -> tuple[list[Choice], bool]:
        """A worker for each request, by the router or, without one, in turn; and whether the router failed to say."""
        router = self._router if use_router else None
        choices = None
        if router is not None:
            choices = await router.choose([request.tokens for request in requests])
        if choices is not None:
            return choices, False
        return [Choice(self._health.next_in_turn(), None) for _ in requests], router is not None

    # --- generation ---

    async def generate_with_routing(
        self,
        method_name: str,
        local_hashes: Any = None,
        num_tokens: int | None = None,
        use_round_robin: bool = False,
        **method_kwargs: Any,
    ) -> Any:
        """Calls a method of the worker that the router chooses; returns the ObjectRef of its result.

        local_hashes: block hashes with ``num_tokens``, or token ids without.
        method_kwargs: of the method, e.g. ``"generate"``: ``data`` (a batch) and ``greedy``.
        The call is not repeated when the worker is lost: ``generate_samples`` does that.
        """
        if use_round_robin:
            worker = await self.get_worker_round_robin()
        else:
            worker = await self.get_best_worker_id(local_hashes, num_tokens)
        return self.run_single_worker_single_data(method_name, self.get_dp_leader_worker_idx(worker), **method_kwargs)

    async def generate_samples(
        self,
        requests: Sequence[SampleRequest],
        *,
        worker_id: int | None = None,
        choices: Sequence[Choice] | None = None,
        use_router: bool = True,
    ) -> AsyncIterator[Answer]:
        """Generates each sample on the worker that the router chooses for it; yields answers as they come.

        worker_id: one worker for all; choices: one for each, decided before; instead of the router's.
        A worker that is lost has its samples generated by others.
        """
        fallback = False
        began = time.perf_counter()
        if worker_id is not None:
            if not 0 <= worker_id < self.dp_size:
                raise ValueError(f"worker_id must be from 0 to {self.dp_size - 1}, not {worker_id}")
            choices = [Choice(worker_id, None)] * len(requests)
        elif choices is None:
            choices, fallback = await self.choose(requests, use_router)
        wait_s = time.perf_counter() - began
        answers = self._dispatcher.run(requests, choices, wait_s=wait_s, fallback=fallback)
        try:
            async for answer in answers:
                yield answer
        finally:
            await answers.aclose()  # type: ignore[attr-defined]
