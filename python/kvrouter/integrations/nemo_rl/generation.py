"""NeMo-RL's VllmGeneration, with a router that it asks for each request."""

from __future__ import annotations

import contextlib
import contextvars
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import ray
from nemo_rl.models.generation.vllm.vllm_generation import VllmGeneration

from kvrouter.config import RouterConfig, WorkerAddress
from kvrouter.integrations.nemo_rl.config import HTTP_GATEWAY, router_settings
from kvrouter.integrations.nemo_rl.decisions import DecisionsOfATurn
from kvrouter.integrations.nemo_rl.gateway import Gateway
from kvrouter.integrations.nemo_rl.metrics import StepMetrics
from kvrouter.ray import background
from kvrouter.ray.router_handle import Choice, RouterHandle

logger = logging.getLogger("kvrouter.nemo_rl")

#: One worker of each data-parallel shard: the one with the engine.
LEADERS = ["tensor_parallel", "pipeline_parallel"]

_chosen: contextvars.ContextVar[int | None] = contextvars.ContextVar("kvrouter_chosen_shard", default=None)


class RoutedVllmGeneration(VllmGeneration):  # type: ignore[misc]
    """``VllmGeneration`` whose ``generate_async`` goes where the prompt's prefix is cached.

    Without ``router_cfg``, or with ``enabled: false``, it is ``VllmGeneration`` in all that it does.  As picklable as
    that: a copy in another process (the trajectory collector of asynchronous GRPO) asks the same router over HTTP.

    A router that cannot start is no error: it is said once, and requests go round robin.  Raises ValueError, naming the
    key, for a ``router_cfg`` that cannot be.
    """

    # Of the class, so that they are there however an object came to be.
    router: RouterHandle | None = None
    dp_openai_server_base_urls: list[str | None]
    worker_server_base_urls: list[str | None] | None = None
    _settings: RouterConfig | None = None
    _decisions: DecisionsOfATurn | None = None
    _gateway: Gateway | None = None
    _step_metrics: StepMetrics | None = None
    _caches_used = False

    def __init__(self, cluster: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        self._settings = router_settings(config)
        super().__init__(cluster, config, *args, **kwargs)
        if self._settings is None:
            return
        self._start_gateway()
        if not self._defer_model_load:
            self._start_router()

    # --- router and gateway ---

    @property
    def router_enabled(self) -> bool:
        """Whether the config asks for a router."""
        return self._settings is not None

    def _start_router(self) -> None:
        """The engines run: listens to them."""
        assert self._settings is not None
        try:
            config = self._config_for_engines(self._settings)
            publishers = self._on_leaders("kvrouter_publishers")
            addresses = [WorkerAddress(p.node_ip, p.ports.kv_events, p.ports.load) for p in publishers]
            if config.get("replay"):
                # A worker whose usual replay port was taken has another one.
                replay = [f"tcp://{p.node_ip}:{p.ports.replay}" for p in publishers]
                config = {**config, "replay": replay}  # type: ignore[typeddict-item]
            self.router = RouterHandle.start(config, addresses)
        except Exception as error:  # whatever it is, training goes on
            logger.warning("Failed to initialize router: %s", error)
            logger.warning("Continuing without router: requests go round robin")
            return
        self._decisions = DecisionsOfATurn(self.router)
        self._step_metrics = StepMetrics(self.router)
        print(f"  ✓ Dynamic router initialized with {len(addresses)} workers, block_size={config['block_size']}")

    def _config_for_engines(self, settings: RouterConfig) -> RouterConfig:
        """With the block size that the engines really have."""
        sizes = set(self._on_leaders("kvrouter_block_size"))
        if len(sizes) != 1:
            raise RuntimeError(f"workers differ in their KV block size: {sorted(sizes)}: set vllm_kwargs.block_size")
        (size,) = sizes
        if size != settings["block_size"]:
            logger.warning(
                "the engines have KV blocks of %d tokens, router_cfg.block_size is %d: %d is used",
                size,
                settings["block_size"],
                size,
            )
        return {**settings, "block_size": size}

    def _start_gateway(self) -> None:
        """NeMo-Gym's rollouts ask the workers' HTTP servers: puts a gateway before these, where there are any."""
        assert self._settings is not None
        urls = self.dp_openai_server_base_urls
        if not urls or not all(urls) or not self.cfg["router_cfg"].get(HTTP_GATEWAY, True):
            return
        self.worker_server_base_urls = list(urls)
        try:
            if self._gateway is None:
                self._gateway = Gateway(urls, self._on_leaders("kvrouter_publishers"), self._settings)
        except Exception as error:
            logger.warning("Failed to start the HTTP gateway: %s; NeMo-Gym asks the workers directly", error)
            return
        self.dp_openai_server_base_urls = [self._gateway.base_url]

    def load_and_start(self) -> None:
        """As NeMo-RL's; then the router starts."""
        super().load_and_start()
        if self._settings is not None:
            self._start_gateway()  # the URLs have been asked for anew
            self._start_router()

    def _on_leaders(self, method: str) -> list[Any]:
        found: list[Any] = ray.get(self.worker_group.run_all_workers_single_data(method, run_rank_0_only_axes=LEADERS))
        return found

    # --- generation ---

    async def _async_generate_base(
        self, data: Any, method_name: str, data_validation_fn: Callable[[Any], bool], greedy: bool = False
    ) -> AsyncIterator[Any]:
        choice = await self._choose(data)
        generated: int | None = None
        _chosen.set(None if choice is None else choice.worker)  # read before anything is waited for
        try:
            results = super()._async_generate_base(data, method_name, data_validation_fn, greedy)
            async with contextlib.aclosing(results):
                async for result in results:
                    with contextlib.suppress(KeyError, IndexError, TypeError):
                        generated = int(result[1]["generation_lengths"][0])
                    yield result
        finally:
            _chosen.set(None)
            if choice is not None and self.router is not None:
                self.router.complete(choice, generated)

    async def _choose(self, data: Any) -> Choice | None:
        """The router's choice; None where it has none: no router, a text, images, or no answer."""
        if self._decisions is None or not isinstance(data, Mapping) or "vllm_content" in data:
            return None
        if "input_ids" not in data or "input_lengths" not in data or len(data["input_ids"]) != 1:
            return None
        self._caches_used = True
        began = time.perf_counter()
        tokens = data["input_ids"][0][: int(data["input_lengths"][0])]
        choice = await self._decisions.choose(tokens.cpu().numpy())
        if self._step_metrics is not None and choice is not None:
            self._step_metrics.decided(choice, len(tokens), time.perf_counter() - began)
        return choice

    def _next_dp_shard_idx(self) -> int:
        shard = _chosen.get()
        _chosen.set(None)
        quarantined = (
            shard is not None and self.fleet_selector is not None and shard not in self.fleet_monitor.serving_shards()
        )
        if shard is None or quarantined:
            return int(super()._next_dp_shard_idx())
        return shard

    # --- caches that are emptied ---

    def finish_generation(self, *args: Any, **kwargs: Any) -> bool:
        """As NeMo-RL's, which empties the prefix caches; the router knows at once."""
        return self._emptying(super().finish_generation, *args, **kwargs)

    def invalidate_kv_cache(self) -> bool:
        """As NeMo-RL's; the router knows at once."""
        return self._emptying(super().invalidate_kv_cache)

    def _emptying(self, empty: Callable[..., bool], *args: Any, **kwargs: Any) -> bool:
        router = self.router
        if router is None:
            return empty(*args, **kwargs)
        # First: a quick worker would otherwise have said that it is cleared before anybody waits for that.
        background.run(router.reset(until_cleared=True))
        emptied: list[bool] = []
        try:
            done = empty(*args, **kwargs)
            if done:
                emptied = self._on_leaders("kvrouter_emptied")
            return done
        finally:
            # Nobody will say of the others that they are cleared.
            for worker in range(router.num_workers):
                if worker >= len(emptied) or not emptied[worker]:
                    background.run(router.reset(worker))
            self._caches_used = False

    def _refitted(self) -> None:
        """New weights are about to come.

        Caches that were emptied since they were last used are known to be empty.  Asynchronous GRPO generates in
        another process, and either invalidates the caches after the refit or goes on with old KV on purpose.
        """
        if self.router is not None and self._caches_used:
            background.run(self.router.reset())
            self._caches_used = False

    def update_weights_via_ipc_zmq(self) -> list[Any]:
        """As NeMo-RL's; the router starts anew."""
        self._refitted()
        return list(super().update_weights_via_ipc_zmq())

    def update_weights_from_collective(self) -> list[Any]:
        """As NeMo-RL's; the router starts anew."""
        self._refitted()
        return list(super().update_weights_from_collective())

    def nccl_reshard_refit(self) -> list[Any]:
        """As NeMo-RL's; the router starts anew."""
        self._refitted()
        return list(super().nccl_reshard_refit())

    # --- the rest ---

    def get_step_metrics(self) -> dict[str, float]:
        """NeMo-RL's, and ``router/...`` figures since the last call: see ``metrics``."""
        figures: dict[str, float] = super().get_step_metrics()
        if self._step_metrics is not None:
            try:
                counters = self._on_leaders("kvrouter_cache_counters")
            except ray.exceptions.RayError:
                counters = []
            figures = {**figures, **self._step_metrics.take(counters)}
        return figures

    def shutdown(self) -> bool:
        """Ends gateway and router (in the process that started them), and then as NeMo-RL's."""
        gateway, self._gateway = self._gateway, None
        if gateway is not None:
            gateway.close()
        router, self.router, self._decisions, self._step_metrics = self.router, None, None, None
        if router is not None:
            router.close()
        return bool(super().shutdown())

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_gateway", "_decisions", "_step_metrics")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.router is not None:
            self._decisions = DecisionsOfATurn(self.router)
