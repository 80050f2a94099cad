"""The generation config, and what is made of it: the router's settings and vLLM's engine arguments."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Literal, TypedDict

from typing_extensions import NotRequired

from kvrouter.config import DEFAULT_BLOCK_SIZE, DEFAULT_KV_EVENTS_PORT, DEFAULT_METRICS_PORT, RouterConfig

DEFAULT_SIM_MODEL_LEN = 8192


class ColocationConfig(TypedDict):
    """Whether generation shares its GPUs with training: its engine then sleeps between rollouts."""

    enabled: bool
    resources: NotRequired[dict[str, Any]]


class GenerationConfig(TypedDict):
    """What ``VllmGeneration`` is made with; the names are NeMo-RL's.

    backend: "vllm".
    engine: "vllm" (default), or "sim": the simulated engine, which takes ``sim_cfg`` (options of ``SimWorker``).
    model_name: a model's folder or name.
    max_new_tokens: tokens to generate, at most.
    temperature, top_p, top_k, stop_token_ids, stop_strings: of sampling; default: temperature 1, no limits, no stops.
    ignore_eos: go on after the model's end token (default false); for benchmarks.
    seed: of sampling; worker N's engine takes ``seed`` + N.
    vllm_cfg: see ``engine_arguments``; ``env_vars`` go into the engine's environment.
    vllm_kwargs: further arguments of vLLM's ``AsyncEngineArgs``, as they are.
    colocated: default: not.
    router_cfg: the router; without it, or with ``enabled: false``, requests go round robin.
    """

    backend: NotRequired[Literal["vllm"]]
    engine: NotRequired[Literal["vllm", "sim"]]
    model_name: str
    max_new_tokens: int
    temperature: NotRequired[float]
    top_p: NotRequired[float]
    top_k: NotRequired[int | None]
    stop_token_ids: NotRequired[list[int] | None]
    stop_strings: NotRequired[list[str] | None]
    ignore_eos: NotRequired[bool]
    seed: NotRequired[int]
    vllm_cfg: NotRequired[dict[str, Any]]
    vllm_kwargs: NotRequired[dict[str, Any]]
    sim_cfg: NotRequired[dict[str, Any]]
    colocated: NotRequired[ColocationConfig]
    router_cfg: NotRequired[RouterConfig | None]
    _pad_token_id: NotRequired[int]


# vllm_cfg's keys that are arguments of vLLM's engine under another or the same name.
_ENGINE_KEYS = {
    "precision": "dtype",
    "tensor_parallel_size": "tensor_parallel_size",
    "pipeline_parallel_size": "pipeline_parallel_size",
    "gpu_memory_utilization": "gpu_memory_utilization",
    "max_model_len": "max_model_len",
    "enforce_eager": "enforce_eager",
    "load_format": "load_format",
    "kv_cache_dtype": "kv_cache_dtype",
    "skip_tokenizer_init": "skip_tokenizer_init",
}
_OTHER_KEYS = ("async_engine", "env_vars", "expert_parallel_size")


def check_generation_config(config: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the key, for a config that cannot be served."""
    backend = config.get("backend", "vllm")
    if backend != "vllm":
        raise ValueError(f"policy.generation.backend must be 'vllm', not {backend!r}")
    if config.get("engine", "vllm") not in ("vllm", "sim"):
        raise ValueError(f"policy.generation.engine must be 'vllm' or 'sim', not {config['engine']!r}")
    for key in ("model_name", "max_new_tokens"):
        if key not in config:
            raise ValueError(f"the generation config lacks {key}")
    if config["max_new_tokens"] < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {config['max_new_tokens']}")
    vllm_cfg = config.get("vllm_cfg", {})
    known = [*_ENGINE_KEYS, *_OTHER_KEYS]
    for key in vllm_cfg:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]}?" if near else "arguments of vLLM's own go into vllm_kwargs"
            raise ValueError(f"vllm_cfg.{key} is unknown: {hint}")
    if vllm_cfg.get("expert_parallel_size", 1) != 1:
        raise ValueError("vllm_cfg.expert_parallel_size must be 1: set vllm_kwargs.enable_expert_parallel instead")
    if router_enabled(config.get("router_cfg")) and not vllm_cfg.get("async_engine", True):
        raise ValueError(
            "Router can only be used with async_engine=true. Please enable async_engine in your vLLM config."
        )


def engine_arguments(config: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """Arguments of vLLM's ``AsyncEngineArgs`` for worker ``rank``."""
    vllm_cfg = config.get("vllm_cfg", {})
    arguments: dict[str, Any] = {
        "model": config["model_name"],
        "seed": config.get("seed", 0) + rank,
        "block_size": router_block_size(config),
        "enable_prefix_caching": True,
        # What was sampled from, after temperature, top-p and top-k: what a policy's loss needs.
        "logprobs_mode": "processed_logprobs",
        "disable_log_stats": False,
    }
    arguments.update({argument: vllm_cfg[key] for key, argument in _ENGINE_KEYS.items() if key in vllm_cfg})
    if model_parallel_size(config) > 1:
        arguments["distributed_executor_backend"] = "mp"
    if config.get("colocated", {}).get("enabled", False):
        arguments["enable_sleep_mode"] = True
    arguments.update(config.get("vllm_kwargs", {}))
    return arguments


def model_parallel_size(config: Mapping[str, Any]) -> int:
    """GPUs (or cores) of one engine: tensor times pipeline parallelism."""
    vllm_cfg = config.get("vllm_cfg", {})
    sizes = [vllm_cfg.get(key, 1) for key in ("tensor_parallel_size", "pipeline_parallel_size")]
    for key, size in zip(("tensor_parallel_size", "pipeline_parallel_size"), sizes, strict=True):
        if size < 1:
            raise ValueError(f"vllm_cfg.{key} must be at least 1, got {size}")
    return int(sizes[0] * sizes[1])


def router_enabled(router: Mapping[str, Any] | None) -> bool:
    """Whether this ``router_cfg`` asks for a router."""
    return router is not None and bool(router.get("enabled", False))


def router_block_size(config: Mapping[str, Any]) -> int:
    """Tokens a KV block, as the router is to assume it."""
    return int((config.get("router_cfg") or {}).get("block_size", DEFAULT_BLOCK_SIZE))


def base_ports(config: Mapping[str, Any]) -> tuple[int, int]:
    """The ports of worker 0 for KV events and load."""
    router = config.get("router_cfg") or {}
    return (
        int(router.get("base_kv_events_port", DEFAULT_KV_EVENTS_PORT)),
        int(router.get("base_metrics_port", DEFAULT_METRICS_PORT)),
    )


def router_config_from(master_config: Mapping[str, Any]) -> RouterConfig | None:
    """The router's settings in a whole training config, under either of their two names.

    ``policy.generation.router_cfg`` is what the generation reads; ``grpo.router`` is the name in the guide, and its
    keys win where both are given (so ``grpo.router.enabled=false`` on a command line turns the router off).
    """
    generation = (master_config.get("policy") or {}).get("generation") or {}
    merged = {**(generation.get("router_cfg") or {}), **((master_config.get("grpo") or {}).get("router") or {})}
    if not merged:
        return None
    settings = {
        "enabled": False,
        "block_size": DEFAULT_BLOCK_SIZE,
        "base_kv_events_port": DEFAULT_KV_EVENTS_PORT,
        "base_metrics_port": DEFAULT_METRICS_PORT,
        **merged,
    }
    return settings  # type: ignore[return-value]
