"""The Ray actor around one engine."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from kvrouter.ray.batched_data_dict import BatchedDataDict
from kvrouter.ray.config import base_ports
from kvrouter.ray.engine import (
    Engine,
    EngineDeadError,
    EngineSpec,
    SampleRequest,
    SampleResult,
    WeightSource,
    make_engine,
)
from kvrouter.ray.ports import PortClaim, claim_ports
from kvrouter.ray.router_metrics import Ledger
from kvrouter.ray.samples import batch_of_results, requests_of_batch

logger = logging.getLogger("kvrouter.ray")

RESET_POLL_S = 0.05
START_ATTEMPTS = 2


class WorkerNotReadyError(RuntimeError):
    """This worker has no engine yet (it is being restarted); another may serve."""


@dataclass(frozen=True)
class WorkerReport:
    """What a worker says of itself once its engine runs.

    rank: number of the worker among those that serve (its data-parallel rank).
    kv_events_port, metrics_port, replay_port: as they are really bound, on every interface of the node.
    """

    rank: int
    node_id: str
    node_ip: str
    pid: int
    kv_events_port: int
    metrics_port: int
    replay_port: int
    block_size: int
    max_model_len: int
    weight_version: int


class VllmGenerationWorker:
    """One engine in a Ray actor: the leader of its tensor-parallel ranks, which are processes below it.

    A restarted actor has no engine until ``start`` is called again: whoever restarts it brings the weights that the
    others have, so that no sample is ever generated with old ones.
    """

    def __init__(self, config: Mapping[str, Any], spec: EngineSpec) -> None:
        self._config = config
        self._spec = spec
        self._engine: Engine | None = None
        self._claim: PortClaim | None = None
        self._starting = asyncio.Lock()
        self._weight_version = 0
        self._ledger = Ledger()

    # --- life ---

    async def start(self, devices: Sequence[str] = (), weights: WeightSource | None = None) -> WorkerReport:
        """Starts the engine if there is none, loads ``weights`` if they are newer than its own, and reports.

        devices: GPUs of the tensor-parallel ranks besides this actor's own.
        Raises RuntimeError when the engine cannot start.
        """
        async with self._starting:
            if self._engine is None:
                own = [str(device) for device in ray.get_gpu_ids()]
                spec = dataclasses.replace(self._spec, devices=[*own, *devices])
                self._engine = await self._start_engine(spec)
                self._weight_version = 0
            if weights is not None and weights.version > self._weight_version:
                if weights.path is None and weights.state_dict is None:
                    raise WorkerNotReadyError(
                        f"worker {self._spec.rank} lacks the weights that were broadcast while it was away"
                    )
                await self._engine.load_weights(weights)
                self._weight_version = weights.version
        return self.report()

    async def _start_engine(self, spec: EngineSpec) -> Engine:
        kv_events, load = base_ports(self._config)
        for attempt in range(START_ATTEMPTS):
            # The second time with free ports: somebody may have taken the first ones meanwhile.
            claim = claim_ports(kv_events + spec.rank, load - kv_events, prefer_base=attempt == 0)
            engine = make_engine(spec, claim.ports)
            try:
                await engine.start()
            except Exception as error:
                await engine.stop()
                claim.release()
                if attempt + 1 == START_ATTEMPTS or not _says_port_taken(error):
                    raise RuntimeError(f"worker {spec.rank}: the engine did not start: {error}") from error
                logger.warning("worker %d: a port was taken while the engine started; trying others", spec.rank)
                continue
            self._claim = claim
            return engine
        raise AssertionError("unreachable")

    def report(self) -> WorkerReport:
        """Where it is and what it has bound.  Raises WorkerNotReadyError before ``start``."""
        engine = self._serving()
        assert self._claim is not None
        ports = self._claim.ports
        return WorkerReport(
            rank=self._spec.rank,
            node_id=ray.get_runtime_context().get_node_id(),
            node_ip=ray.util.get_node_ip_address(),
            pid=os.getpid(),
            kv_events_port=ports.kv_events,
            metrics_port=ports.load,
            replay_port=ports.replay,
            block_size=engine.block_size,
            max_model_len=engine.max_model_len,
            weight_version=self._weight_version,
        )

    async def watch(self) -> None:
        """Returns never: the call fails at the moment at which this process ends, and ends it when the engine has."""
        while True:
            await asyncio.sleep(1.0)
            if self._engine is not None:
                try:
                    await self._engine.check_health()
                except EngineDeadError as error:
                    _leave(f"worker {self._spec.rank}: {error}")

    def is_alive(self) -> bool:
        """True."""
        return True

    async def shutdown(self) -> bool:
        """Ends the engine and frees its ports; a second call does nothing."""
        async with self._starting:
            if self._engine is not None:
                await self._engine.stop()
                self._engine = None
            if self._claim is not None:
                self._claim.release()
                self._claim = None
        return True

    def _serving(self) -> Engine:
        if self._engine is None:
            raise WorkerNotReadyError(f"worker {self._spec.rank} has no engine yet")
        return self._engine

    # --- what NeMo-RL's workers tell ---

    def get_node_ip(self) -> str:
        """Address of its node."""
        return self.report().node_ip

    def get_dp_rank(self) -> int:
        """Its data-parallel rank."""
        return self._spec.rank

    def get_kv_events_port(self) -> int:
        """Port of its KV events."""
        return self.report().kv_events_port

    def get_metrics_port(self) -> int:
        """Port of its load messages."""
        return self.report().metrics_port

    # --- generation ---

    async def generate_sample(self, request: SampleRequest) -> SampleResult:
        """Generates one sample.

        Raises WorkerNotReadyError without an engine, ValueError for a prompt that the engine cannot take; a dead
        engine takes this process with it, so that the call fails as it does when a node is lost.
        """
        engine = self._serving()
        transit = time.time() - request.decided_at if request.decided_at else 0.0
        version = self._weight_version
        try:
            result = await engine.generate(request)
        except EngineDeadError as error:
            _leave(f"worker {self._spec.rank}: {error}")
        self._ledger.record(request, result, engine.block_size)
        result.weight_version = version
        result.transit_s = transit
        return result

    async def generate(self, data: Mapping[str, Any], greedy: bool = False) -> BatchedDataDict:
        """All samples of ``data`` on this worker; columns as ``VllmGeneration.generate`` has them."""
        requests = requests_of_batch(data, greedy)
        results = await asyncio.gather(*map(self.generate_sample, requests))
        return batch_of_results(data, results, self._config.get("_pad_token_id", 0))

    async def generate_async(self, data: Mapping[str, Any], greedy: bool = False) -> BatchedDataDict:
        """``generate`` under the name that NeMo-RL's async worker has."""
        return await self.generate(data, greedy)

    async def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, as the model's tokenizer gives them."""
        return await self._serving().tokenize(texts)

    # --- caches and weights ---

    async def cache_counters(self) -> tuple[int, int]:
        """Prompt tokens looked up in, and taken from, the engine's prefix cache since its start."""
        return await self._serving().cache_counters()

    async def ledger(self, clear: bool = False) -> Ledger:
        """What it served since its start or the last ``clear``."""
        ledger = self._ledger
        if clear:
            self._ledger = Ledger()
        return ledger

    async def reset_prefix_cache(self, timeout_s: float = 30.0, preempt_running: bool = False) -> bool:
        """Forgets every cached prefix.  While requests hold blocks it is tried again, for ``timeout_s`` seconds."""
        engine = self._serving()
        deadline = time.monotonic() + timeout_s
        while not await engine.reset_prefix_cache(preempt_running):
            if time.monotonic() >= deadline:
                return False
            await asyncio.sleep(RESET_POLL_S)
        return True

    async def update_weights(self, source: WeightSource, empty_cache: bool = False) -> bool:
        """Loads new weights between two engine steps; False when the cache was to be emptied, and is not.

        empty_cache: no token is computed from blocks of the old weights any more: requests under way compute anew.
        """
        engine = self._serving()
        await engine.pause()
        try:
            await engine.load_weights(source)
            self._weight_version = source.version
            return not empty_cache or await engine.reset_prefix_cache(preempt_running=True)
        finally:
            await engine.resume()

    async def init_collective(self, ip: str, port: int, first_rank: int, world_size: int) -> None:
        """Joins the group in which the trainer (rank 0) broadcasts weights."""
        await self._serving().init_collective(ip, port, first_rank, world_size)

    async def update_weights_from_collective(self, info: Mapping[str, tuple[Sequence[int], str]], version: int) -> int:
        """Receives weights of these names, shapes and types; returns their version."""
        await self._serving().receive_weights(info)
        self._weight_version = version
        return version

    async def sleep(self, level: int = 1) -> None:
        """Gives GPU memory back."""
        await self._serving().sleep(level)

    async def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Takes GPU memory again."""
        await self._serving().wake_up(tags)


class ModelParallelPeer:
    """Holds the GPU of a further tensor-parallel rank, which runs below the leader."""

    def devices(self) -> list[str]:
        """Ids of the GPUs that Ray gave it."""
        return [str(device) for device in ray.get_gpu_ids()]


def _says_port_taken(error: BaseException) -> bool:
    text = str(error).lower()
    return "address already in use" in text or "address in use" in text or "taken" in text


def _leave(reason: str) -> Any:
    # Ray starts the actor anew; a normal exit would be final.
    logger.error("%s: this worker ends, to be restarted", reason)
    os._exit(1)
