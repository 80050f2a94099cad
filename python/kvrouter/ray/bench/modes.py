"""The three ways in, each as its users have it, behind one interface for the runner."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from kvrouter.ray.batched_data_dict import BatchedDataDict, to_numpy
from kvrouter.ray.bench.records import RayRequestRecord
from kvrouter.ray.bench.settings import Integration, RayBenchSettings
from kvrouter.ray.bench.work import Batch
from kvrouter.ray.generation import VllmGeneration
from kvrouter.router import KvRouter

ROUND_ROBIN, KV_AWARE = "round_robin", "kv_aware"


class Mode(ABC):
    """One way in.  ``prepare`` comes before the batches of one routing, ``finish`` after them."""

    #: Whether the samples of a batch wait for their decisions one after the other, not all for one.
    decides_one_by_one = False

    def __init__(self, generation: VllmGeneration, settings: RayBenchSettings) -> None:
        self.generation = generation
        self.settings = settings
        self.greedy = settings.num_generations_per_prompt == 1
        self.routing = KV_AWARE

    @abstractmethod
    async def prepare(self, routing: str) -> None:
        """The router is to be new, to know nothing, and to route so."""

    @abstractmethod
    async def run(self, batch: Batch) -> list[RayRequestRecord]:
        """All samples of the batch at once; the records in its order."""

    async def finish(self) -> None:
        """The batches of this routing are done."""
        await self.generation.stop_router()

    async def _restart_router(self, routing: str) -> None:
        self.routing = routing
        await self.generation.stop_router()
        config: Any = self.generation.worker_group.router_config
        config["mode"] = "round_robin" if routing == ROUND_ROBIN else "best_worker"
        await self.generation.worker_group.start_router()

    def _record(self, batch: Batch, row: int, result: BatchedDataDict, began: float, **more: Any) -> RayRequestRecord:
        """``result``: one row; ``began``: when the batch was in hand, by ``time.perf_counter``."""
        latency_s = time.perf_counter() - began
        figures = {name: float(to_numpy(result[name])[0]) for name in ("transit_s", "ttft_s", "generation_s")}
        return RayRequestRecord(
            index=batch.first_index + row,
            prefix_id=int(batch.prefix_ids[row]),
            prompt_tokens=int(batch.data["input_lengths"][row]),
            cached_tokens=int(to_numpy(result["num_cached_tokens"])[0]),
            completion_tokens=int(to_numpy(result["generation_lengths"])[0]),
            # What the engine took after its first token lies after the first token here, too.
            ttft_ms=1e3 * (latency_s - (figures["generation_s"] - figures["ttft_s"])),
            latency_ms=1e3 * latency_s,
            transit_ms=1e3 * figures["transit_s"],
            attempts=1,
            **more,
        )


class SimpleMode(Mode):
    """``VllmGeneration`` with ``router_cfg``: routing is no concern of the caller."""

    async def prepare(self, routing: str) -> None:
        """A router of this ``router_cfg.mode``."""
        await self._restart_router(routing)

    async def run(self, batch: Batch) -> list[RayRequestRecord]:
        """One ``generate_async`` for the batch."""
        began = time.perf_counter()
        records: list[Any] = [None] * batch.data.size
        leaders = self.generation.worker_group.dp_leader_worker_indices
        async for row, result in self.generation.generate_async(batch.data, self.greedy):
            records[row] = self._record(
                batch,
                row,
                result,
                began,
                worker=leaders.index(result["gen_leader_worker_idx"][0]),
                predicted_blocks=result["overlap_blocks"][0],
                router_us=1e6 * float(to_numpy(result["router_s"])[0]),
            )
        return records


class ManualMode(Mode):
    """``VllmGeneration`` without a router, and a ``KvRouter`` in this process that is asked for each sample."""

    decides_one_by_one = True

    async def prepare(self, routing: str) -> None:
        """A ``KvRouter`` that listens to the engines where they really are."""
        self.routing = routing
        await self.generation.stop_router()
        addresses = self.generation.worker_addresses()
        config: Any = self.generation.worker_group.router_config
        self.router = KvRouter(
            block_size=self.settings.block_size,
            num_workers=len(addresses),
            base_kv_events_port=config["base_kv_events_port"],
            base_metrics_port=config["base_metrics_port"],
            worker_addresses=[address.host for address in addresses],
            worker_ports=[address.kv_events_port for address in addresses],
            policy=self.settings.policy,
            seed=self.settings.seed,
        )
        self.router.start()
        await asyncio.to_thread(self.router.wait_until_connected, 10.0)

    async def run(self, batch: Batch) -> list[RayRequestRecord]:
        """A decision for each sample, then one ``generate_async`` for each, to its worker."""
        began = time.perf_counter()
        rows = list(batch.data.rows())
        return list(await asyncio.gather(*(self._one(batch, row, data, began) for row, data in enumerate(rows))))

    async def _one(self, batch: Batch, row: int, data: BatchedDataDict, began: float) -> RayRequestRecord:
        asked = time.perf_counter()
        predicted: int | None = None
        if self.routing == KV_AWARE:
            decision = self.router.route(data["input_ids"][0][: data["input_lengths"][0]])
            worker, predicted = decision.worker, decision.overlap_blocks
        else:
            worker = self.router.worker_round_robin()
        router_us = 1e6 * (time.perf_counter() - asked)
        async for _, result in self.generation.generate_async(data, self.greedy, worker_id=worker):
            return self._record(
                batch, row, result, began, worker=worker, predicted_blocks=predicted, router_us=router_us
            )
        raise AssertionError("unreachable: one sample, one result")

    async def finish(self) -> None:
        """The router goes."""
        self.router.close()


class IntegratedMode(Mode):
    """``RoutedVllmWorkerGroup``: a decision for the batch, then a call of each chosen worker."""

    async def prepare(self, routing: str) -> None:
        """A router that decides for whole batches."""
        await self._restart_router(routing)

    async def run(self, batch: Batch) -> list[RayRequestRecord]:
        """One ``get_best_worker_ids_batch``, then one ``generate`` of a worker for each sample."""
        group = self.generation.worker_group
        began = time.perf_counter()
        rows = list(batch.data.rows())
        if self.routing == KV_AWARE:
            prompts = [row["input_ids"][0][: row["input_lengths"][0]] for row in rows]
            workers = await group.get_best_worker_ids_batch(prompts)
        else:
            workers = [await group.get_worker_round_robin() for _ in rows]
        router_us = 1e6 * (time.perf_counter() - began)
        decided_at = np.asarray([time.time()])

        async def one(row: int, data: BatchedDataDict, worker: int) -> RayRequestRecord:
            data["decided_at"] = decided_at
            result = await group.run_single_worker_single_data(
                "generate", group.get_dp_leader_worker_idx(worker), data=data, greedy=self.greedy
            )
            return self._record(batch, row, result, began, worker=worker, router_us=router_us)

        answers = [one(row, data, worker) for row, (data, worker) in enumerate(zip(rows, workers, strict=True))]
        return list(await asyncio.gather(*answers))


MODES: dict[Integration, type[Mode]] = {
    Integration.SIMPLE: SimpleMode,
    Integration.MANUAL: ManualMode,
    Integration.INTEGRATED: IntegratedMode,
}
