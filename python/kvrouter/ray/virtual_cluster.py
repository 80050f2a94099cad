"""RayVirtualCluster: the part of a Ray cluster that one group of workers has for itself."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

PLACEMENT_TIMEOUT_S = 180.0


@dataclass(frozen=True)
class Bundle:
    """A place for one worker: bundle ``index`` of a placement group, on node ``node_id``."""

    group: PlacementGroup
    index: int
    node_id: str


class RayVirtualCluster:
    """Bundles of resources, a placement group for each node; a subset of NeMo-RL's class of this name.

    bundle_ct_per_node_list: number of bundles (one GPU each, or one CPU worker) on each node.
    use_gpus: whether a bundle has a GPU.
    max_colocated_worker_groups: how many groups of workers share each bundle.
    num_gpus_per_node: of NeMo-RL's interface; a node of more bundles is refused.
    name: prefix of the placement groups' names.
    num_cpus_per_bundle: CPUs of a bundle, default ``max_colocated_worker_groups``; may be a fraction, for many
        simulated workers on few cores.

    Placement groups (STRICT_PACK: a node's bundles are on one node) are made when first needed; two of them share a
    node only where it has room for both.  Raises ValueError, naming the setting, for values out of range.
    """

    def __init__(
        self,
        bundle_ct_per_node_list: Sequence[int],
        use_gpus: bool = True,
        max_colocated_worker_groups: int = 1,
        num_gpus_per_node: int = 8,
        name: str = "",
        *,
        num_cpus_per_bundle: float | None = None,
    ) -> None:
        if not bundle_ct_per_node_list or any(count < 1 for count in bundle_ct_per_node_list):
            raise ValueError(f"bundle_ct_per_node_list must hold counts from 1 on, not {bundle_ct_per_node_list!r}")
        if use_gpus and max(bundle_ct_per_node_list) > num_gpus_per_node:
            raise ValueError(
                f"bundle_ct_per_node_list asks for {max(bundle_ct_per_node_list)} GPUs of a node and num_gpus_per_node "
                f"is {num_gpus_per_node}"
            )
        if max_colocated_worker_groups < 1:
            raise ValueError(f"max_colocated_worker_groups must be at least 1, got {max_colocated_worker_groups}")
        self.bundle_ct_per_node_list = list(bundle_ct_per_node_list)
        self.use_gpus = use_gpus
        self.max_colocated_worker_groups = max_colocated_worker_groups
        self.num_gpus_per_node = num_gpus_per_node
        self.name = name
        self.num_cpus_per_bundle = float(
            max_colocated_worker_groups if num_cpus_per_bundle is None else num_cpus_per_bundle
        )
        self._groups: list[PlacementGroup] | None = None

    def world_size(self) -> int:
        """Bundles of all nodes."""
        return sum(self.bundle_ct_per_node_list)

    def node_count(self) -> int:
        """Nodes."""
        return len(self.bundle_ct_per_node_list)

    def get_placement_groups(self) -> list[PlacementGroup]:
        """The placement groups, one a node, made and waited for on the first call.

        Raises RuntimeError when Ray has no room for them within three minutes.
        """
        if self._groups is None:
            groups = [self._make_group(node, count) for node, count in enumerate(self.bundle_ct_per_node_list)]
            try:
                for group in groups:
                    ray.get(group.ready(), timeout=PLACEMENT_TIMEOUT_S)
            except ray.exceptions.GetTimeoutError:
                for group in groups:
                    remove_placement_group(group)
                raise RuntimeError(
                    f"Ray found no room for {self.bundle_ct_per_node_list} bundles a node, {self._bundle_resources()} "
                    f"each, within {PLACEMENT_TIMEOUT_S:.0f} s; it has {ray.available_resources()}: lower "
                    "bundle_ct_per_node_list (cluster.gpus_per_node, cluster.num_nodes), or add nodes"
                ) from None
            self._groups = groups
        return self._groups

    def bundles(self) -> list[Bundle]:
        """All bundles, those of a node together, in the order of the nodes."""
        found: list[Bundle] = []
        for group in self.get_placement_groups():
            nodes = ray.util.placement_group_table(group)["bundles_to_node_id"]
            found += [Bundle(group, index, nodes[index]) for index in sorted(nodes)]
        return found

    def worker_resources(self) -> dict[str, float]:
        """CPUs and GPUs of one worker: its share of a bundle."""
        share = 1.0 / self.max_colocated_worker_groups
        return {"num_cpus": self.num_cpus_per_bundle * share, "num_gpus": share if self.use_gpus else 0.0}

    def shutdown(self) -> bool:
        """Removes the placement groups, and with them the actors in them; a second call does nothing."""
        if self._groups is not None:
            groups, self._groups = self._groups, None
            if ray.is_initialized():
                for group in groups:
                    remove_placement_group(group)
        return True

    def _bundle_resources(self) -> dict[str, float]:
        resources = {"CPU": self.num_cpus_per_bundle}
        if self.use_gpus:
            resources["GPU"] = 1.0
        return resources

    def _make_group(self, node: int, count: int) -> PlacementGroup:
        bundles: list[dict[str, Any]] = [self._bundle_resources()] * count
        # Ray wants every group's name to be its own, and two clusters of one job may have the same.
        name = f"{self.name or 'kvrouter'}-node{node}-{uuid.uuid4().hex[:8]}"
        return placement_group(bundles, strategy="STRICT_PACK", name=name)
