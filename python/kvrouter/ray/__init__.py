"""Rollouts on Ray: fleets of vLLM engines in actors, and one router for all who send them requests.

Three ways in (docs/ray.md has each in its shortest form):

- simple: ``VllmGeneration(cluster, config)`` with ``config["router_cfg"]``; routing is automatic;
- manual: ``VllmGeneration`` without it, and a ``kvrouter.KvRouter`` of one's own that is asked for each request;
- integrated: ``RoutedVllmWorkerGroup``, workers and router in one object.

Needs Ray (``pip install 'kvrouter[ray]'``); torch only where tensors come in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvrouter.ray.batched_data_dict import BatchedDataDict
    from kvrouter.ray.config import GenerationConfig, router_config_from
    from kvrouter.ray.dispatch import GenerationError
    from kvrouter.ray.generation import VllmGeneration
    from kvrouter.ray.routed_worker_group import RoutedVllmWorkerGroup
    from kvrouter.ray.virtual_cluster import RayVirtualCluster
    from kvrouter.ray.worker_group import RayWorkerBuilder, RayWorkerGroup

__all__ = [
    "BatchedDataDict",
    "GenerationConfig",
    "GenerationError",
    "RayVirtualCluster",
    "RayWorkerBuilder",
    "RayWorkerGroup",
    "RoutedVllmWorkerGroup",
    "VllmGeneration",
    "router_config_from",
]

_MODULES = {
    "BatchedDataDict": "batched_data_dict",
    "GenerationConfig": "config",
    "GenerationError": "dispatch",
    "RayVirtualCluster": "virtual_cluster",
    "RayWorkerBuilder": "worker_group",
    "RayWorkerGroup": "worker_group",
    "RoutedVllmWorkerGroup": "routed_worker_group",
    "VllmGeneration": "generation",
    "router_config_from": "config",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
