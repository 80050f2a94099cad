"""NeMo-RL's asynchronous vLLM worker, with KV events, replay and load published for a router."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from nemo_rl.distributed.worker_group_utils import get_nsight_config_if_pattern_matches
from nemo_rl.models.generation.vllm.vllm_worker_async import VllmAsyncGenerationWorkerImpl

from kvrouter.integrations.nemo_rl.config import router_settings
from kvrouter.ray.engine.base import TOPIC, EnginePorts
from kvrouter.ray.ports import PortClaim, claim_ports
from kvrouter.vllm.kv_events import kv_events_config
from kvrouter.vllm.load_channel import BASE_PORT_VARIABLE, ENDPOINT_VARIABLE, WORKER_VARIABLE
from kvrouter.vllm.ports import port_is_unused


@dataclass(frozen=True)
class WorkerPublishers:
    """Where a worker publishes: its node's address, and its ports."""

    node_ip: str
    ports: EnginePorts


class PublishingWorker:
    """Mix-in before a worker of NeMo-RL's: claims ports of its own, and has its engine publish on them.

    NeMo-RL gives every worker the same config, so a fixed endpoint in it would clash on a node with two workers: each
    takes base port + data-parallel rank, or free ports where those are taken, and says which (``kvrouter_publishers``).
    They are known before the model is loaded.
    """

    cfg: Any
    llm: Any

    def __init__(self, config: Any, bundle_indices: Any = None, *args: Any, **kwargs: Any) -> None:
        settings = router_settings(config)
        if settings is None:
            raise ValueError("this worker needs policy.generation.router_cfg.enabled=true")
        self._kvrouter_block_size = settings["block_size"]
        self._kvrouter_emptied = False
        self._kvrouter_claim: PortClaim | None = None
        self._kvrouter_counters: Any = None
        self._nemo_stat_loggers: list[Any] = []
        if bundle_indices is not None:  # else it is a tensor-parallel rank below another worker
            vllm_cfg = config["vllm_cfg"]
            ranks = vllm_cfg["tensor_parallel_size"] * vllm_cfg["pipeline_parallel_size"]
            port = settings["base_kv_events_port"] + int(os.environ.get("RANK", "0")) // ranks
            offset = settings["base_metrics_port"] - settings["base_kv_events_port"]
            # Another run on this node may hold the ports long before its engines listen there.
            mine = all(port_is_unused(wanted) for wanted in (port, port + offset))
            self._kvrouter_claim = claim_ports(port, offset, prefer_base=mine)
        super().__init__(config, bundle_indices, *args, **kwargs)  # type: ignore[call-arg]

    # --- the engine ---

    def _create_engine(self, llm_kwargs: dict[str, Any]) -> None:
        from vllm.config import KVEventsConfig

        from kvrouter.ray.engine.vllm_stats import CacheCounters

        assert self._kvrouter_claim is not None
        ports = self._kvrouter_claim.ports
        # The load publisher is given its endpoint: it must not find another one in the environment.
        for variable in (ENDPOINT_VARIABLE, BASE_PORT_VARIABLE, WORKER_VARIABLE):
            os.environ.pop(variable, None)
        self._kvrouter_counters = CacheCounters()
        events = kv_events_config(0, ports.kv_events, base_replay_port=ports.replay, topic=TOPIC)
        super()._create_engine(  # type: ignore[misc]
            {"block_size": self._kvrouter_block_size}
            | llm_kwargs
            | {"enable_prefix_caching": True, "kv_events_config": KVEventsConfig(**events)}
        )
        self._kvrouter_claim.release()  # bound by the engine now
        self._note_resets()

    @property
    def stat_loggers(self) -> list[Any]:
        """What NeMo-RL gives the engine, and the router's."""
        from kvrouter.vllm.load_publisher import LoadPublisher

        assert self._kvrouter_claim is not None
        load = f"tcp://*:{self._kvrouter_claim.ports.load}"
        return [*self._nemo_stat_loggers, self._kvrouter_counters, partial(LoadPublisher, endpoint=load)]

    @stat_loggers.setter
    def stat_loggers(self, loggers: list[Any]) -> None:
        self._nemo_stat_loggers = list(loggers)

    def _note_resets(self) -> None:
        """NeMo-RL does not look whether vLLM did empty its prefix cache (it does not while requests hold blocks)."""
        reset = self.llm.reset_prefix_cache

        async def reset_prefix_cache(*args: Any, **kwargs: Any) -> bool:
            self._kvrouter_emptied = False
            self._kvrouter_emptied = bool(await reset(*args, **kwargs))
            return self._kvrouter_emptied

        self.llm.reset_prefix_cache = reset_prefix_cache

    # --- the HTTP server ---

    def _setup_vllm_openai_api_server(self, app: Any) -> Any:
        """NeMo-RL's routes, and those by which a gateway knows the server: /health, /v1/models, /metrics."""
        from fastapi import Response
        from vllm.v1.metrics.prometheus import get_prometheus_registry

        app = super()._setup_vllm_openai_api_server(app)  # type: ignore[misc]

        async def health() -> Response:
            try:
                await self.llm.check_health()
            except Exception:  # whatever it is, this engine is not to be sent to
                return Response(status_code=503)
            return Response()

        async def models() -> dict[str, Any]:
            name = self.cfg["model_name"]
            return {"object": "list", "data": [{"id": name, "object": "model", "owned_by": "vllm", "root": name}]}

        def metrics() -> Response:
            from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

            return Response(generate_latest(get_prometheus_registry()), media_type=CONTENT_TYPE_LATEST)

        for path, endpoint in (("/health", health), ("/v1/models", models), ("/metrics", metrics)):
            app.add_api_route(path, endpoint, response_model=None)
        return app

    # --- what the driver asks ---

    def kvrouter_publishers(self) -> WorkerPublishers:
        """Where it publishes, or will when its engine runs."""
        assert self._kvrouter_claim is not None
        return WorkerPublishers(ray.util.get_node_ip_address(), self._kvrouter_claim.ports)

    def kvrouter_block_size(self) -> int:
        """Tokens in a KV block, as the engine has it."""
        return int(self.llm.vllm_config.cache_config.block_size)

    def kvrouter_emptied(self) -> bool:
        """Whether the engine did empty its prefix cache when it was last told to."""
        return self._kvrouter_emptied

    def kvrouter_cache_counters(self) -> tuple[int, int]:
        """Prompt tokens looked up in, and taken from, the prefix cache since the start."""
        return self._kvrouter_counters.queries, self._kvrouter_counters.hits


class RoutedVllmAsyncGenerationWorkerImpl(PublishingWorker, VllmAsyncGenerationWorkerImpl):  # type: ignore[misc]
    """The two together."""


@ray.remote(runtime_env={**get_nsight_config_if_pattern_matches("vllm_async_generation_worker")})
class RoutedVllmAsyncGenerationWorker(RoutedVllmAsyncGenerationWorkerImpl):
    """The actor."""
