"""RayWorkerGroup: the actors of one fleet of engines, on the bundles of a virtual cluster."""

from __future__ import annotations

import importlib
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from kvrouter.ray.config import model_parallel_size
from kvrouter.ray.engine.base import EngineSpec
from kvrouter.ray.virtual_cluster import Bundle, RayVirtualCluster
from kvrouter.ray.worker import ModelParallelPeer, VllmGenerationWorker

MAX_CALLS_PER_WORKER = 10_000


class RayWorkerBuilder:
    """What a group makes its workers of: a class, or its fully qualified name, and the config that each is given."""

    def __init__(self, worker: type | str = VllmGenerationWorker, config: Mapping[str, Any] | None = None) -> None:
        if config is None:
            raise ValueError("RayWorkerBuilder needs the generation config: RayWorkerBuilder(config=...)")
        self.worker: type = _class_of(worker) if isinstance(worker, str) else worker
        self.config = config


class RayWorkerGroup:
    """A worker for each data-parallel shard, and a peer for each further GPU of one.

    ``workers`` holds all actors, shard by shard, a shard's leader first: ``dp_leader_worker_indices`` tells where.
    Actors that die are started anew by Ray; see ``kvrouter.ray.recovery`` for what happens then.

    cluster: where the actors go, a bundle each.
    name_prefix: of the actors' names.
    workers_per_node: how many of each node's bundles are used: a number, or one for each node; default all.
    bundle_indices_list: instead of it, (node, [bundles]) for each shard.
    Raises ValueError, naming the setting, when the bundles do not make whole shards.
    """

    def __init__(
        self,
        cluster: RayVirtualCluster,
        remote_worker_builder: RayWorkerBuilder,
        workers_per_node: int | Sequence[int] | None = None,
        name_prefix: str = "",
        bundle_indices_list: Sequence[tuple[int, Sequence[int]]] | None = None,
        env_vars: Mapping[str, str] | None = None,
    ) -> None:
        config = remote_worker_builder.config
        size = model_parallel_size(config)
        shards = _shards(cluster, size, workers_per_node, bundle_indices_list)
        self.name_prefix = name_prefix
        self.workers: list[Any] = []
        self.dp_leader_worker_indices: list[int] = []
        self.node_ids = [shard[0].node_id for shard in shards]
        self.devices: list[list[str]] = []
        options = cluster.worker_resources()
        hosts = _host_of_node()
        places = _places_on_host([hosts.get(node, node) for node in self.node_ids])
        for rank, shard in enumerate(shards):
            index_on_host, on_host = places[rank]
            spec = EngineSpec(
                {**config, "vllm_cfg": _with_environment(config, env_vars)},
                rank,
                index_on_host,
                on_host,
            )
            self.dp_leader_worker_indices.append(len(self.workers))
            self.workers.append(
                _actor(
                    remote_worker_builder.worker,
                    shard[0],
                    f"{name_prefix}-{rank}",
                    max_concurrency=MAX_CALLS_PER_WORKER,
                    **options,
                ).remote(config, spec)
            )
            peers = [
                _actor(ModelParallelPeer, bundle, f"{name_prefix}-{rank}-peer", **options).remote()
                for bundle in shard[1:]
            ]
            self.workers += peers
            devices = ray.get([peer.devices.remote() for peer in peers])
            self.devices.append([device for owned in devices for device in owned])

    @property
    def dp_size(self) -> int:
        """Number of engines."""
        return len(self.dp_leader_worker_indices)

    def get_dp_leader_worker_idx(self, dp_shard_idx: int) -> int:
        """Where in ``workers`` the leader of a shard stands."""
        return self.dp_leader_worker_indices[dp_shard_idx]

    def leader(self, dp_shard_idx: int) -> Any:
        """The actor with the engine of a shard."""
        return self.workers[self.dp_leader_worker_indices[dp_shard_idx]]

    def leaders(self) -> list[Any]:
        """The actors with an engine, in the order of the shards."""
        return [self.workers[index] for index in self.dp_leader_worker_indices]

    def run_single_worker_single_data(self, method_name: str, worker_idx: int, **kwargs: Any) -> Any:
        """Calls a method of the actor ``workers[worker_idx]``; returns the ObjectRef of its result."""
        return getattr(self.workers[worker_idx], method_name).remote(**kwargs)

    def run_all_workers_single_data(self, method_name: str, **kwargs: Any) -> list[Any]:
        """Calls a method of every engine's actor; returns the ObjectRefs of the results."""
        return [getattr(worker, method_name).remote(**kwargs) for worker in self.leaders()]


def _class_of(name: str) -> type:
    module, _, attribute = name.rpartition(".")
    found = getattr(importlib.import_module(module), attribute)
    if not isinstance(found, type):
        raise ValueError(f"{name} is no class")
    return found


def _actor(cls: type, bundle: Bundle, name: str, *, num_cpus: float, num_gpus: float, **options: Any) -> Any:
    return ray.remote(cls).options(
        # For Ray's lists; unique, as two groups of one job may have the same prefix.
        name=f"{name}-{uuid.uuid4().hex[:8]}",
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        max_restarts=-1,
        # A lost request is sent elsewhere by us; Ray would wait for the same actor.
        max_task_retries=0,
        scheduling_strategy=PlacementGroupSchedulingStrategy(
            placement_group=bundle.group,
            placement_group_bundle_index=bundle.index,
            placement_group_capture_child_tasks=False,
        ),
        **options,
    )


def _shards(
    cluster: RayVirtualCluster,
    size: int,
    workers_per_node: int | Sequence[int] | None,
    bundle_indices_list: Sequence[tuple[int, Sequence[int]]] | None,
) -> list[list[Bundle]]:
    """The bundles of each engine, those of one always on one node."""
    per_node: list[list[Bundle]] = [[] for _ in range(cluster.node_count())]
    remaining = iter(cluster.bundles())
    for node, count in enumerate(cluster.bundle_ct_per_node_list):
        per_node[node] = [next(remaining) for _ in range(count)]
    if bundle_indices_list is not None:
        chosen = [[per_node[node][index] for index in indices] for node, indices in bundle_indices_list]
        for shard in chosen:
            if len(shard) != size:
                raise ValueError(f"bundle_indices_list: each engine takes {size} bundles, not {len(shard)}")
        return chosen
    if workers_per_node is None:
        counts = [len(bundles) for bundles in per_node]
    elif isinstance(workers_per_node, int):
        counts = [workers_per_node] * len(per_node)
    else:
        counts = list(workers_per_node)
    if len(counts) != len(per_node) or any(
        not 0 <= count <= len(bundles) for count, bundles in zip(counts, per_node, strict=False)
    ):
        raise ValueError(
            f"workers_per_node is {workers_per_node}; the nodes have {cluster.bundle_ct_per_node_list} bundles"
        )
    shards: list[list[Bundle]] = []
    for count, bundles in zip(counts, per_node, strict=True):
        if count % size:
            raise ValueError(
                f"a node's {count} workers do not make engines of {size}: vllm_cfg.tensor_parallel_size times "
                "pipeline_parallel_size must divide the bundles of each node"
            )
        shards += [bundles[first : first + size] for first in range(0, count, size)]
    if not shards:
        raise ValueError("workers_per_node leaves no worker at all")
    return shards


def _host_of_node() -> dict[str, str]:
    return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}


def _places_on_host(hosts: Sequence[str]) -> list[tuple[int, int]]:
    """For each worker: which one of how many it is on its host."""
    total = Counter(hosts)
    seen: Counter[str] = Counter()
    places = []
    for host in hosts:
        places.append((seen[host], total[host]))
        seen[host] += 1
    return places


def _with_environment(config: Mapping[str, Any], env_vars: Mapping[str, str] | None) -> dict[str, Any]:
    vllm_cfg = dict(config.get("vllm_cfg", {}))
    if env_vars:
        vllm_cfg["env_vars"] = {**vllm_cfg.get("env_vars", {}), **env_vars}
    return vllm_cfg
