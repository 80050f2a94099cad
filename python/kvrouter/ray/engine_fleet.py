"""EngineFleet: a group of engines that lives on when one of them dies, in whatever process it is held."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import ray

from kvrouter.config import RouterConfig, WorkerAddress
from kvrouter.ray import background
from kvrouter.ray.batched_data_dict import is_tensor
from kvrouter.ray.config import check_generation_config, router_block_size
from kvrouter.ray.dispatch import WORKER_ERRORS, Answer, Dispatcher
from kvrouter.ray.engine.base import SampleRequest, WeightSource
from kvrouter.ray.health import FleetHealth
from kvrouter.ray.recovery import Recovery, address_of
from kvrouter.ray.router_handle import Choice, RouterHandle
from kvrouter.ray.router_metrics import Ledger, summed_up
from kvrouter.ray.virtual_cluster import RayVirtualCluster
from kvrouter.ray.worker import WorkerReport
from kvrouter.ray.worker_group import RayWorkerBuilder, RayWorkerGroup

RESET_TIMEOUT_S = 30.0


class EngineFleet(RayWorkerGroup):
    """The engines of a group: started, watched, restarted with the weights that all have, and ended.

    Picklable.  The process that made the fleet owns it: it alone restarts workers, updates weights and ends them; a
    copy sends requests and empties caches.

    Raises ValueError for settings that do not fit, RuntimeError when an engine does not start.
    """

    def __init__(
        self,
        cluster: RayVirtualCluster,
        remote_worker_builder: RayWorkerBuilder,
        router_config: RouterConfig | None = None,
        workers_per_node: int | Sequence[int] | None = None,
        name_prefix: str = "",
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
        self.weight_version = 0
        self._router: RouterHandle | None = None
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
        self._dispatcher = Dispatcher(self.leaders(), self._health, self._recovery.lost, self._done)

    def _done(self, request: SampleRequest, choice: Choice, answer: Answer | None) -> None:
        """Tells the router what became of a request: its policy and its self-check learn from that."""
        router = self._router
        if router is None:
            return
        if answer is None or answer.worker != choice.worker:  # lost, given up, or served by another worker
            router.complete(choice)
            return
        result = answer.result
        router.complete(choice, len(result.tokens), result.transit_s + result.ttft_s)
        router.report_hit(choice, request.tokens, result.cached_tokens)

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

    @property
    def is_owner(self) -> bool:
        """Whether the fleet was made in this process, not pickled to it."""
        return self._owner

    def is_up(self, worker: int) -> bool:
        """Whether this process sends requests to the worker."""
        return self._health.is_up(worker)

    def report(self, worker: int) -> WorkerReport:
        """What the worker said of itself when its engine last started: node, process, ports."""
        return self._recovery.reports[worker]

    def worker_addresses(self) -> list[WorkerAddress]:
        """Where each worker publishes its KV events and its load, as it really is bound.

        For a ``KvRouter`` of one's own: ``worker_addresses=[a.host ...]``, ``worker_ports=[a.kv_events_port ...]``.
        """
        return [address_of(self._recovery.reports[rank]) for rank in range(self.dp_size)]

    async def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, by a worker's tokenizer."""
        tokens: list[list[int]] = await self.leader(self._health.next_in_turn()).tokenize.remote(list(texts))
        return tokens

    # --- caches and weights ---

    async def reset_prefix_caches(self, preempt_running: bool = False) -> bool:
        """Empties every worker's prefix cache, and tells the router at once; False if a worker did not do it.

        preempt_running: requests under way give their blocks back and compute anew; else their end is waited for.
        """
        outcomes = await self._each_emptying("reset_prefix_cache", RESET_TIMEOUT_S, preempt_running)
        return all(outcome is True for outcome in outcomes)

    async def _each_emptying(self, method: str, *args: Any) -> list[Any]:
        """``_each`` with a method that empties caches, and says True when it has; the router is told."""
        router = self._router
        if router is None:
            return await self._each(method, *args)
        # First: a quick worker would otherwise have said that it is cleared before anybody waits for that.
        await router.reset(until_cleared=True)
        emptied: set[int] = set()
        try:
            outcomes = await self._each(method, *args)
            emptied.update(worker for worker, outcome in enumerate(outcomes) if outcome is True)
            return outcomes
        finally:
            # Nobody will say of the others that they are cleared.
            for worker in range(self.dp_size):
                if worker not in emptied:
                    await router.reset(worker)

    async def update_weights(
        self, state_dict: Mapping[str, Any] | None = None, path: str | None = None, keep_kv_cache: bool = False
    ) -> bool:
        """Loads new weights into every worker; see ``VllmGeneration.update_weights``."""
        self._check_owner("update weights")
        version = self.weight_version + 1
        if state_dict is not None:
            state_dict = {
                name: value.detach().cpu() if is_tensor(value) else value for name, value in state_dict.items()
            }
        # Ray's copy: the trainer goes on changing its tensors, and a worker restarted later must get what all have.
        reference = ray.put(WeightSource(version, path, state_dict))
        self.weight_version = version
        self._recovery.weights = reference
        each = self._each if keep_kv_cache else self._each_emptying
        outcomes = await each("update_weights", reference, not keep_kv_cache)
        return all(outcome is True for outcome in outcomes)

    def receive_weights(self, info: Mapping[str, Any]) -> list[Any]:
        """Has every worker receive broadcast weights; returns the ObjectRefs, whose results are the new version."""
        self._check_owner("update weights")
        self.weight_version += 1
        self._recovery.weights = ray.put(WeightSource(self.weight_version))
        return [
            leader.update_weights_from_collective.remote(dict(info), self.weight_version) for leader in self.leaders()
        ]

    def _check_owner(self, what: str) -> None:
        if not self._owner:
            raise RuntimeError(f"this is a copy: only the process that made the fleet can {what}")

    async def cache_counters(self) -> list[tuple[int, int]]:
        """Of each worker that is up: prompt tokens looked up in, and taken from, its prefix cache since its start."""
        outcomes = await self._each("cache_counters")
        return [outcome if isinstance(outcome, tuple) else (0, 0) for outcome in outcomes]

    def router_metrics(self, clear: bool = False) -> dict[str, Any]:
        """What was decided and what became of it, whichever process asked; see ``router_metrics.summed_up``.

        clear: start anew.  A worker that is restarted starts anew, too.
        """
        ledgers = background.run(self._each("ledger", clear))
        return summed_up([ledger if isinstance(ledger, Ledger) else Ledger() for ledger in ledgers])

    async def _each(self, method: str, *args: Any) -> list[Any]:
        """The method's result on each worker; for one that is lost, the error that it was lost with."""
        calls = [asyncio.wrap_future(getattr(leader, method).remote(*args).future()) for leader in self.leaders()]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        for worker, outcome in enumerate(outcomes):
            if isinstance(outcome, WORKER_ERRORS):
                self._recovery.lost(worker)
            elif isinstance(outcome, BaseException):
                raise outcome
        return outcomes

    # --- the end ---

    def _close_router(self) -> None:
        router, self._router = self._router, None
        self._recovery.router = None
        if router is not None:
            router.close()

    def shutdown(self, cleanup_method: str | None = None, timeout: float = 30.0, force: bool = False) -> bool:
        """Ends router and workers; a second call does nothing, and neither does one on a copy.

        cleanup_method: a method of the workers to call first instead of ``shutdown``.
        timeout: seconds for it.
        force: end the actors without it.
        Returns False when a worker did not end in order.
        """
        self._recovery.close()
        if self._closed or not self._owner:
            return True
        self._closed = True
        self._close_router()
        if not ray.is_initialized():
            return True
        in_order = force or self._all_in_order(cleanup_method or "shutdown", timeout)
        for worker in self.workers:
            ray.kill(worker)
        return in_order

    def _all_in_order(self, method: str, timeout: float) -> bool:
        calls = [getattr(leader, method).remote() for leader in self.leaders()]
        done, late = ray.wait(calls, num_returns=len(calls), timeout=timeout)
        in_order = not late
        for call in done:
            try:
                ray.get(call)
            except ray.exceptions.RayError:
                in_order = False
        return in_order

    async def shutdown_async(
        self, cleanup_method: str | None = None, timeout: float = 30.0, force: bool = False
    ) -> bool:
        """``shutdown`` without blocking the caller's loop."""
        return await asyncio.to_thread(self.shutdown, cleanup_method, timeout, force)
