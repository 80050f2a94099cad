"""The Ray cluster and the engines of a benchmark run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from kvrouter.bench.settings import EngineName
from kvrouter.ray.bench.settings import RayBenchSettings
from kvrouter.ray.local_cluster import local_ray
from kvrouter.ray.virtual_cluster import RayVirtualCluster
from kvrouter.vllm.engines import is_cpu_vllm
from kvrouter.vllm.tiny_model import default_model_dir, make_tiny_model

_CPU_CACHE_GIB = 1


@contextmanager
def ray_cluster(settings: RayBenchSettings) -> Iterator[None]:
    """Ray, connected to: the cluster at ``RAY_ADDRESS``, or nodes of its own on this machine, gone at the end."""
    log_to_driver = settings.log_level.value in ("DEBUG", "INFO")
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=log_to_driver, logging_level="ERROR")
        try:
            yield
        finally:
            ray.shutdown()
        return
    gpus = settings.gpus_per_node if uses_gpus(settings) else 0
    with local_ray(settings.num_nodes, settings.gpus_per_node, gpus, log_to_driver=log_to_driver):
        yield


def uses_gpus(settings: RayBenchSettings) -> bool:
    """Whether each engine has a GPU."""
    return settings.engine is EngineName.VLLM and not is_cpu_vllm()


def virtual_cluster(settings: RayBenchSettings) -> RayVirtualCluster:
    """A bundle for each GPU, or worker."""
    return RayVirtualCluster(
        [settings.gpus_per_node] * settings.num_nodes,
        use_gpus=uses_gpus(settings),
        num_gpus_per_node=settings.gpus_per_node,
        name="kvrouter-bench",
    )


def generation_config(settings: RayBenchSettings) -> dict[str, Any]:
    """The config of the engines; the router's part is the KV-aware one."""
    config: dict[str, Any] = {
        "backend": "vllm",
        "engine": settings.engine.value,
        "model_name": settings.model or "kvrouter-tiny",
        "max_new_tokens": settings.generation_max_tokens,
        "ignore_eos": True,
        "seed": settings.seed,
        "vllm_cfg": {"async_engine": True, "max_model_len": settings.max_model_len},
        "router_cfg": {
            "enabled": True,
            "block_size": settings.block_size,
            "base_kv_events_port": settings.base_kv_events_port,
            "base_metrics_port": settings.base_metrics_port,
            "mode": "best_worker",
            "policy": settings.policy,
        },
    }
    if settings.engine is EngineName.SIM:
        config["sim_cfg"] = {
            "num_blocks": settings.blocks,
            "max_num_seqs": settings.max_num_seqs or 4,
            "vocab_size": settings.vocab_size,
            "time_scale": settings.time_scale,
        }
        return config
    config["vllm_cfg"]["tensor_parallel_size"] = settings.tensor_parallel_size
    config["vllm_kwargs"] = _vllm_arguments(settings)
    if settings.model is None:
        length = max(8192, settings.max_model_len)
        model = make_tiny_model(default_model_dir() / f"tiny-qwen2-512x8-{length}", max_position_embeddings=length)
        config["model_name"] = str(model.path)
        config["vllm_cfg"] |= {
            "precision": "float32" if is_cpu_vllm() else "bfloat16",
            "enforce_eager": True,
            "load_format": "dummy",
            "env_vars": {"VLLM_CPU_KVCACHE_SPACE": str(_CPU_CACHE_GIB)},
        }
        config["vllm_kwargs"]["tokenizer"] = str(model.tokenizer)
    return config


def _vllm_arguments(settings: RayBenchSettings) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    if settings.blocks is not None:
        arguments["num_gpu_blocks_override"] = settings.blocks
    if settings.max_num_seqs is not None or settings.model is None:
        arguments["max_num_seqs"] = settings.max_num_seqs or 4
    if settings.model is None:
        arguments["max_num_batched_tokens"] = max(2048, settings.max_model_len)
    return arguments
