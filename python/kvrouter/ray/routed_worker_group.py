"""RoutedVllmWorkerGroup: workers and the router that knows them, in one object."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import numpy as np
import ray

from kvrouter.config import RouterConfig, WorkerAddress
from kvrouter.ray import background
from kvrouter.ray.batched_data_dict import to_numpy
from kvrouter.ray.config import check_generation_config, router_block_size, router_enabled
from kvrouter.ray.dispatch import Answer, Dispatcher
from kvrouter.ray.engine.base import SampleRequest, WeightSource
from kvrouter.ray.health import FleetHealth
from kvrouter.ray.recovery import Recovery, address_of
from kvrouter.ray.router_handle import Choice, RouterHandle
from kvrouter.ray.router_metrics import Ledger, summed_up
from kvrouter.ray.virtual_cluster import RayVirtualCluster
from kvrouter.ray.worker_group import RayWorkerBuilder, RayWorkerGroup

logger = logging.getLogger("kvrouter.ray")

DISABLED = "Routing is disabled. Use run_single_worker_single_data() to manually specify worker_id."
NOT_STARTED = "Router not started. Call await start_router() first."
RESET_TIMEOUT_S = 30.0


class RoutedVllmWorkerGroup(RayWorkerGroup):
    """Engines in Ray actors, and one router that every holder of this object asks.

    Picklable: a copy in another process asks the same workers and the same router, which runs in the process that made
    the group; only that one restarts workers, starts the router, and ends them.

    router_config: the router's settings; None or ``enabled: False``: no routing.
    For the rest see ``RayWorkerGroup``.  Engines are started here, which takes as long as the slowest takes.
    Raises ValueError for settings that do not fit, RuntimeError when an engine does not start.
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
        config = dict(remote_worker_builder.config)
        if router_config is not None:
            config["router_cfg"] = dict(router_config)
        check_generation_config(config)
        builder = RayWorkerBuilder(remote_worker_builder.worker, config)
        super().__init__(cluster, builder, workers_per_node, name_prefix, bundle_indices_list, env_vars)
        self.router_config: RouterConfig | None = config.get("router_cfg")
        self.block_size = router_block_size(config)
        self._router: RouterHandle | None = None
        self._weight_version = 0
        self._connect(owner=True)
        try:
            self._recovery.start_all()
        except Exception:
            self.shutdown(force=True)
            raise

    def _connect(self, owner: bool) -> None:
        self._owner = owner
        self._closed = False
        self._health = FleetHealth(self.dp_size)
        self._recovery = Recovery(self.leaders(), self.devices, self._health, owner)
        self._recovery.router = self._router
        self._dispatcher = Dispatcher(self.leaders(), self._health, self._recovery.lost)

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("_health", "_recovery", "_dispatcher", "_owner", "_closed")
        state = {name: value for name, value in self.__dict__.items() if name not in left_out}
        state["_reports"] = self._recovery.reports
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        reports = state.pop("_reports")
        self.__dict__.update(state)
        self._connect(owner=False)
        self._recovery.reports = reports

    # --- the router ---

    @property
    def router(self) -> RouterHandle | None:
        """The way to the router; None while there is none."""
        return self._router

    @property
    def router_enabled(self) -> bool:
        """Whether a router is asked for."""
        return router_enabled(self.router_config)

    @property
    def is_owner(self) -> bool:
        """Whether this object was made in this process, not pickled to it."""
        return self._owner

    def is_up(self, worker: int) -> bool:
        """Whether this process sends requests to the worker."""
        return self._health.is_up(worker)

    def worker_addresses(self) -> list[WorkerAddress]:
        """Where each worker publishes its KV events and its load, as it really is bound.

        For a ``KvRouter`` of one's own: ``worker_addresses=[a.host ...]``, ``worker_ports=[a.kv_events_port ...]``.
        """
        return [address_of(self._recovery.reports[rank]) for rank in range(self.dp_size)]

    async def start_router(self, enable_kv_indexer: bool = True) -> None:
        """Starts the router; nothing if it runs.

        enable_kv_indexer: False to know loads only.
        Raises RuntimeError when routing is disabled, ValueError or RuntimeError when the router cannot start.
        """
        await asyncio.to_thread(self.start_router_now, enable_kv_indexer)

    def start_router_now(self, enable_kv_indexer: bool = True) -> None:
        """``start_router`` for callers without a loop."""
        config = self.router_config
        if config is None or not self.router_enabled:
            raise RuntimeError("Cannot start router when routing is disabled. Set router_config.enabled=True.")
        if self._router is not None:
            return
        if not self._owner:
            raise RuntimeError("this is a copy: the router is started by the process that made the group")
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
        await asyncio.to_thread(self.stop_router_now)

    def stop_router_now(self) -> None:
        """``stop_router`` for callers without a loop."""
        router, self._router = self._router, None
        self._recovery.router = None
        if router is not None:
            router.close()

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
        return [choice.worker for choice in choices]

    async def get_worker_round_robin(self, local_hashes: Any = None, num_tokens: int | None = None) -> int:
        """The next worker in turn; the arguments do not matter."""
        choice = await self._started_router().round_robin()
        return self._health.next_in_turn() if choice is None else choice.worker

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

    async def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, by a worker's tokenizer."""
        tokens: list[list[int]] = await self.leader(self._health.next_in_turn()).tokenize.remote(list(texts))
        return tokens

    # --- caches and weights ---

    async def reset_prefix_caches(self, preempt_running: bool = False) -> bool:
        """Empties every worker's prefix cache, and tells the router at once; False if a worker did not do it.

        preempt_running: requests under way give their blocks back and compute anew; else their end is waited for.
        """
        outcomes = await self._each("reset_prefix_cache", RESET_TIMEOUT_S, preempt_running)
        if self._router is not None:
            await self._router.reset()
        return all(outcome is True for outcome in outcomes)

    async def update_weights(self, source: WeightSource, keep_kv_cache: bool = False) -> bool:
        """Loads new weights into every worker; a worker that is restarted later gets them, too.

        keep_kv_cache: False also empties the prefix caches, whose contents the old weights made.
        """
        reference = ray.put(source)
        self._recovery.weights = source
        outcomes = await self._each("update_weights", reference)
        self._weight_version = source.version
        fresh = keep_kv_cache or await self.reset_prefix_caches(preempt_running=True)
        return fresh and all(outcome == source.version for outcome in outcomes)

    def receive_weights(self, info: Mapping[str, Any]) -> list[Any]:
        """Has every worker receive broadcast weights; returns the ObjectRefs, whose results are the new version."""
        self._weight_version += 1
        self._recovery.weights = WeightSource(self._weight_version)
        return [
            leader.update_weights_from_collective.remote(dict(info), self._weight_version) for leader in self.leaders()
        ]

    def next_weight_version(self) -> int:
        """The number of the next update."""
        return self._weight_version + 1

    async def cache_counters(self) -> list[tuple[int, int]]:
        """Of each worker that is up: prompt tokens looked up in, and taken from, its prefix cache since its start."""
        outcomes = await self._each("cache_counters")
        return [outcome if isinstance(outcome, tuple) else (0, 0) for outcome in outcomes]

    async def _each(self, method: str, *args: Any) -> list[Any]:
        """The method's result on each worker that is up; an exception for one that is, or gets, lost."""
        calls = [asyncio.wrap_future(getattr(leader, method).remote(*args).future()) for leader in self.leaders()]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        for worker, outcome in enumerate(outcomes):
            if isinstance(outcome, ray.exceptions.RayActorError):
                self._recovery.lost(worker)
            elif isinstance(outcome, BaseException) and self._health.is_up(worker):
                raise outcome
        return outcomes

    # --- figures and the end ---

    def router_metrics(self, clear: bool = False) -> dict[str, Any]:
        """What was decided and what became of it, whichever process asked; see ``router_metrics.summed_up``.

        clear: start anew.  A worker that is restarted starts anew, too.
        """
        ledgers = background.run(self._each("ledger", clear))
        return summed_up([ledger if isinstance(ledger, Ledger) else Ledger() for ledger in ledgers])

    def shutdown(self, cleanup_method: str | None = None, timeout: float = 30.0, force: bool = False) -> bool:
        """Ends router and workers; a second call does nothing, and neither does one on a copy.

        cleanup_method: a method of the workers to call first instead of ``shutdown``.
        timeout: seconds for it.
        force: end the actors without it.
        Returns False when a worker did not end in order.
        """
        self._recovery.close()
        if self._closed or not self._owner or not ray.is_initialized():
            return True
        self._closed = True
        self.stop_router_now()
        in_order = True
        if not force:
            calls = [getattr(leader, cleanup_method or "shutdown").remote() for leader in self.leaders()]
            done, late = ray.wait(calls, num_returns=len(calls), timeout=timeout)
            in_order = not late
            for call in done:
                try:
                    ray.get(call)
                except ray.exceptions.RayError:
                    in_order = False
        for worker in self.workers:
            ray.kill(worker)
        return in_order

    async def shutdown_async(
        self, cleanup_method: str | None = None, timeout: float = 30.0, force: bool = False
    ) -> bool:
        """``shutdown`` without blocking the caller's loop."""
        return await asyncio.to_thread(self.shutdown, cleanup_method, timeout, force)
