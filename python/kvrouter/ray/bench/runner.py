"""One whole run: cluster and engines up, every mode under both routings, results down."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from kvrouter import policy_names
from kvrouter.bench.runner import NoProgress, Progress, WorkloadResult, describe_environment
from kvrouter.ray.bench.fleet import generation_config, ray_cluster, virtual_cluster
from kvrouter.ray.bench.modes import KV_AWARE, MODES, ROUND_ROBIN, Mode
from kvrouter.ray.bench.records import RayRequestRecord, figures_of
from kvrouter.ray.bench.settings import Integration, RayBenchSettings
from kvrouter.ray.bench.work import Batch, make_batches
from kvrouter.ray.generation import VllmGeneration

ROUTINGS = (ROUND_ROBIN, KV_AWARE)


class ModeResult(WorkloadResult):
    """What one mode of integration gave; where results of the standalone benchmark go, this one can."""

    def as_json(self) -> dict[str, Any]:
        """As ``WorkloadResult``, with ``integration`` instead of the workload's name."""
        figures = super().as_json()
        return {"integration": figures.pop("workload"), **figures}


@dataclass
class RayBenchResult:
    """What a run gave: one result a mode, and where it was measured."""

    settings: RayBenchSettings
    workloads: list[WorkloadResult]
    environment: dict[str, Any]

    @property
    def failed(self) -> int:
        """Samples that nobody answered."""
        return sum(result.failed for result in self.workloads)

    def as_json(self) -> list[dict[str, Any]]:
        """As the standalone benchmark writes it for several workloads: an object a mode."""
        return [
            {
                "workload": "unique" if self.settings.prefixes == 0 else "thrash",
                "engine": self.settings.engine.value,
                **result.as_json(),
                "settings": self.settings.as_json(),
                "environment": self.environment,
            }
            for result in self.workloads
        ]


def run_ray_benchmark(settings: RayBenchSettings, progress: Progress | None = None) -> RayBenchResult:
    """Run everything that `settings` ask for; Ray and engines are gone when this returns or raises.

    Raises:
        ValueError: settings that do not fit together; the message names the flag to change.
        RuntimeError: the cluster or an engine did not start.
    """
    settings.validate()
    if settings.policy not in policy_names():
        raise ValueError(f"--policy {settings.policy!r} is unknown; there are: {', '.join(policy_names())}")
    batches = make_batches(settings)
    progress = progress or NoProgress()
    progress.stage(f"starting {settings.num_nodes} Ray node(s)")
    with ray_cluster(settings):
        progress.stage(f"starting {settings.num_workers} {settings.engine.value} engines in Ray actors")
        cluster = virtual_cluster(settings)
        with VllmGeneration(cluster, generation_config(settings), name_prefix="bench") as generation:
            run = _Run(settings, generation, batches, progress)
            results: list[WorkloadResult] = [run.mode(integration) for integration in settings.integrations]
            environment = {**describe_environment(), "ray": ray.__version__, "nodes": settings.num_nodes}
    return RayBenchResult(settings, results, environment)


class _Run:
    def __init__(
        self,
        settings: RayBenchSettings,
        generation: VllmGeneration,
        batches: Sequence[Batch],
        progress: Progress,
    ) -> None:
        self._settings = settings
        self._generation = generation
        self._batches = batches
        self._progress = progress
        node_ids = generation.worker_group.node_ids
        self._nodes = list(dict.fromkeys(node_ids))
        self._node_of_worker = [self._nodes.index(node) for node in node_ids]
        self._here = ray.get_runtime_context().get_node_id()
        self._warm_up()

    def _warm_up(self) -> None:
        """The first requests of an engine take several times as long as the next."""
        self._progress.stage("warming up")
        row = next(iter(self._batches[0].data.rows()))
        for worker in range(self._generation.dp_size):
            asyncio.run(_drain(self._generation, row, worker))

    def mode(self, integration: Integration) -> ModeResult:
        """Both routings of this mode, as often as settings say."""
        result = ModeResult(integration.value)
        mode = MODES[integration](self._generation, self._settings)
        for repeat in range(self._settings.repeats):
            for routing in ROUTINGS if repeat % 2 == 0 else reversed(ROUTINGS):
                figures, records = self._run(mode, integration, routing)
                result.runs[routing].append(figures)
                result.records[routing] += records
        return result

    def _run(self, mode: Mode, integration: Integration, routing: str) -> tuple[dict[str, Any], list[RayRequestRecord]]:
        settings = self._settings
        label = f"{integration.value}, {routing}"
        with self._progress.bar(label, settings.batch_size * len(self._batches)) as advance:
            records, before, wall_s, decisions_s = asyncio.run(self._drive(mode, routing, advance))
        after = asyncio.run(self._generation.worker_group.cache_counters())
        looked_up = sum(a[0] - b[0] for a, b in zip(after, before, strict=True))
        hits = sum(a[1] - b[1] for a, b in zip(after, before, strict=True))
        figures = figures_of(
            records,
            wall_s=wall_s,
            decisions_s=decisions_s,
            hit_rate=hits / looked_up if looked_up else None,
            num_workers=settings.num_workers,
            num_nodes=len(self._nodes),
            block_size=settings.block_size,
        )
        figures["workers_uncounted"] = 0
        return figures, records

    async def _drive(
        self, mode: Mode, routing: str, advance: Callable[[], None]
    ) -> tuple[list[RayRequestRecord], list[tuple[int, int]], float, float]:
        """The warm-up, then the batches that count: their records, the counters before them, their time in all and
        what of it was spent waiting for decisions."""
        group = self._generation.worker_group
        await group.reset_prefix_caches(preempt_running=True)
        await mode.prepare(routing)
        try:
            for batch in self._batches[: self._settings.warmup_iterations]:
                await self._batch(mode, batch, advance)
            before = await group.cache_counters()
            records: list[RayRequestRecord] = []
            decisions_s = 0.0
            began = time.perf_counter()
            for batch in self._batches[self._settings.warmup_iterations :]:
                of_batch, waited_s = await self._batch(mode, batch, advance)
                records += of_batch
                decisions_s += waited_s
            return records, before, time.perf_counter() - began, decisions_s
        finally:
            await mode.finish()

    async def _batch(
        self, mode: Mode, batch: Batch, advance: Callable[[], None]
    ) -> tuple[list[RayRequestRecord], float]:
        records: list[RayRequestRecord] = []
        waited_us = 0.0
        for part in batch.rows() if self._settings.sequential else [batch]:
            of_part = await mode.run(part)
            records += of_part
            waits = [record.router_us or 0.0 for record in of_part]
            waited_us += sum(waits) if mode.decides_one_by_one else max(waits)
        for record in records:
            if record.worker is not None:
                record.node = self._node_of_worker[record.worker]
                record.remote = self._nodes[record.node] != self._here
            advance()
        return records, waited_us * 1e-6


async def _drain(generation: VllmGeneration, row: Any, worker: int) -> None:
    async for _ in generation.generate_async(row, worker_id=worker):
        pass
