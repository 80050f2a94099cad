"""What of NeMo-RL is replaced, and what else of it is relied on: everything that an update of NeMo-RL can break.

Replaced, in this process, between ``apply()`` and ``undo()``:

- ``nemo_rl.algorithms.grpo.VllmGeneration`` and ``nemo_rl.models.generation.vllm.VllmGeneration``: by a subclass, which
  passes their ``isinstance`` checks and travels to other processes by its own name;
- ``nemo_rl.algorithms.grpo.setup``: by a function that hands ``grpo.router`` on to the generation config, and then
  calls it;
- ``nemo_rl.models.generation.vllm.vllm_generation.resolve_generation_worker_cls``: by one that names the worker class
  with KV events, where the config asks for a router.

One entry is added to ``ACTOR_ENVIRONMENT_REGISTRY``, and taken out again.  Relied on is what ``RELIED_ON`` lists.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import CodeType
from typing import Any

from kvrouter.integrations.nemo_rl import versions

_VLLM = "nemo_rl.models.generation.vllm"
_GENERATION = f"{_VLLM}.vllm_generation"
_WORKER = f"{_VLLM}.vllm_worker_async"
_GRPO = "nemo_rl.algorithms.grpo"

NEMO_WORKER = f"{_WORKER}.VllmAsyncGenerationWorker"
ROUTED_WORKER = "kvrouter.integrations.nemo_rl.worker.RoutedVllmAsyncGenerationWorker"


@dataclass(frozen=True)
class Seam:
    """Something of NeMo-RL that has to be as it was.

    module, name: where it is; the name may be ``Class.method``.
    parameters: that a callable has to begin with, in order; () for what is not called.
    uses: names that its code has to use.
    """

    module: str
    name: str
    parameters: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()

    def difference(self) -> str | None:
        """What is not as it was; None when all is."""
        where = f"{self.module}.{self.name}"
        try:
            found: Any = importlib.import_module(self.module)
            for part in self.name.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError):
            return f"{where} is not there"
        function = inspect.unwrap(found.__init__ if inspect.isclass(found) and self.parameters else found)
        if self.parameters:
            parameters = tuple(inspect.signature(function).parameters)
            if parameters[: len(self.parameters)] != self.parameters:
                return f"{where} takes {parameters}, not {self.parameters}"
        missing = set(self.uses) - _names_in(function.__code__) if self.uses else set()
        if missing:
            return f"{where} no longer uses {', '.join(sorted(missing))}"
        return None


def _names_in(code: CodeType) -> set[str]:
    """Names that a function uses, nested functions included."""
    names = {*code.co_names, *code.co_freevars, *code.co_cellvars}
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names_in(constant)
    return names


RELIED_ON = (
    Seam(_GRPO, "setup", ("master_config", "tokenizer", "dataset", "val_dataset"), ("VllmGeneration",)),
    Seam(_VLLM, "VllmGeneration"),
    Seam(
        _GENERATION,
        "VllmGeneration",
        ("self", "cluster", "config", "name_prefix", "workers_per_node", "defer_model_load"),
        ("resolve_generation_worker_cls", "worker_group", "_defer_model_load", "dp_openai_server_base_urls"),
    ),
    Seam(_GENERATION, "resolve_generation_worker_cls", ("default_cls", "config")),
    Seam(
        _GENERATION,
        "VllmGeneration._async_generate_base",
        ("self", "data", "method_name", "data_validation_fn", "greedy"),
        ("_next_dp_shard_idx", "get_dp_leader_worker_idx"),
    ),
    Seam(_GENERATION, "VllmGeneration.generate_async", ("self", "data", "greedy"), ("_async_generate_base",)),
    Seam(_GENERATION, "VllmGeneration._next_dp_shard_idx", ("self",), ("fleet_selector",)),
    Seam(_GENERATION, "VllmGeneration.load_and_start", ("self",), ("dp_openai_server_base_urls",)),
    Seam(_GENERATION, "VllmGeneration.finish_generation", ("self",)),
    Seam(_GENERATION, "VllmGeneration.invalidate_kv_cache", ("self",)),
    Seam(_GENERATION, "VllmGeneration.update_weights_via_ipc_zmq", ("self",)),
    Seam(_GENERATION, "VllmGeneration.update_weights_from_collective", ("self",)),
    Seam(_GENERATION, "VllmGeneration.nccl_reshard_refit", ("self",)),
    Seam(_GENERATION, "VllmGeneration.get_step_metrics", ("self",)),
    Seam(_GENERATION, "VllmGeneration.shutdown", ("self",)),
    Seam(_WORKER, "VllmAsyncGenerationWorkerImpl", ("self", "config", "bundle_indices")),
    Seam(
        _WORKER,
        "VllmAsyncGenerationWorkerImpl._create_engine",
        ("self", "llm_kwargs"),
        ("AsyncEngineArgs", "from_engine_args", "stat_loggers", "llm"),
    ),
    Seam(_WORKER, "VllmAsyncGenerationWorkerImpl._setup_vllm_openai_api_server", ("self", "app")),
    Seam(_WORKER, "VllmAsyncGenerationWorkerImpl.reset_prefix_cache_async", ("self",), ("reset_prefix_cache",)),
    Seam(_WORKER, "VllmAsyncGenerationWorkerImpl.sleep_async", ("self",), ("reset_prefix_cache",)),
    Seam("nemo_rl.distributed.worker_groups", "RayWorkerGroup.run_all_workers_single_data", ("self", "method_name")),
    Seam("nemo_rl.distributed.ray_actor_environment_registry", "ACTOR_ENVIRONMENT_REGISTRY"),
    Seam("nemo_rl.distributed.ray_actor_environment_registry", "get_actor_python_env", ("actor_class_fqn",)),
    Seam("nemo_rl.utils.venvs", "create_local_venv_on_each_node", ("py_executable", "venv_name")),
    Seam("nemo_rl.models.generation.fleet_health", "GenerationFleetHealth.serving_shards", ("self",)),
)

_replaced: list[tuple[Any, str, Any]] = []


def check() -> None:
    """Raises UnsupportedNemoRlError, listing every difference, unless all of ``RELIED_ON`` is as it was."""
    differences = [] if applied() else [found for seam in RELIED_ON if (found := seam.difference()) is not None]
    if differences:
        raise versions.unsupported(differences)


def applied() -> bool:
    """Whether NeMo-RL's names are replaced in this process."""
    return bool(_replaced)


def apply() -> None:
    """Replaces them, all or (when that fails) none.  A second call does nothing."""
    if applied():
        return
    from kvrouter.integrations.nemo_rl.generation import RoutedVllmGeneration

    grpo, vllm, generation = (importlib.import_module(name) for name in (_GRPO, _VLLM, _GENERATION))
    resolve = generation.resolve_generation_worker_cls
    try:
        _replace(grpo, "VllmGeneration", RoutedVllmGeneration)
        _replace(vllm, "VllmGeneration", RoutedVllmGeneration)
        _replace(grpo, "setup", _with_router_config(grpo.setup))
        _replace(generation, "resolve_generation_worker_cls", _with_routed_worker(resolve))
    except BaseException:
        undo()
        raise


def undo() -> None:
    """Puts everything back.  A second call does nothing."""
    while _replaced:
        owner, name, original = _replaced.pop()
        setattr(owner, name, original)
    from nemo_rl.distributed.ray_actor_environment_registry import ACTOR_ENVIRONMENT_REGISTRY

    ACTOR_ENVIRONMENT_REGISTRY.pop(ROUTED_WORKER, None)


def _replace(owner: Any, name: str, value: Any) -> None:
    original = getattr(owner, name)
    setattr(owner, name, value)
    _replaced.append((owner, name, original))


def _with_router_config(setup: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(setup)
    def routed_setup(master_config: Any, *args: Any, **kwargs: Any) -> Any:
        from kvrouter.integrations.nemo_rl.config import hand_on_router_config

        hand_on_router_config(master_config)
        return setup(master_config, *args, **kwargs)

    return routed_setup


def _with_routed_worker(resolve: Callable[..., str]) -> Callable[..., str]:
    @functools.wraps(resolve)
    def resolve_routed(default_cls: str, config: Mapping[str, Any]) -> str:
        from kvrouter.integrations.nemo_rl.config import router_settings
        from kvrouter.integrations.nemo_rl.worker_environment import register_worker

        resolved = resolve(default_cls, config)
        if router_settings(config) is None:
            return resolved
        if resolved != NEMO_WORKER:
            raise ValueError(
                f"policy.generation.router_cfg.enabled does not work with {resolved}: unset quant_cfg, or set"
                " router_cfg.enabled=false"
            )
        register_worker(ROUTED_WORKER, NEMO_WORKER)
        return ROUTED_WORKER

    return resolve_routed
