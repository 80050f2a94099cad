"""vLLM's ``AsyncLLM`` as the engine of a generation worker, with KV events and load published for a router."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kvrouter.ray.config import engine_arguments, model_parallel_size
from kvrouter.ray.engine.base import (
    TOPIC,
    Engine,
    EngineDeadError,
    EnginePorts,
    EngineSpec,
    SampleRequest,
    SampleResult,
    WeightSource,
)
from kvrouter.ray.engine.orphan_guard import OrphanGuard
from kvrouter.ray.engine.state_files import state_dict_file
from kvrouter.vllm.engines import is_cpu_vllm, spread_core
from kvrouter.vllm.kv_events import kv_events_config
from kvrouter.vllm.load_channel import BASE_PORT_VARIABLE, ENDPOINT_VARIABLE, WORKER_VARIABLE

EXTENSION = "kvrouter.ray.engine.vllm_weights.WeightsExtension"
_CPU_CACHE_GIB = 4


class VllmEngine(Engine):
    """One ``AsyncLLM``; tensor-parallel ranks are processes of its own."""

    def __init__(self, spec: EngineSpec, ports: EnginePorts) -> None:
        self._spec = spec
        self._ports = ports
        self._llm: Any = None
        self._guard: OrphanGuard | None = None
        self._counters: Any = None
        self._numbers = itertools.count()

    async def start(self) -> None:
        """Builds the engine; blocks the loop while it does (tens of seconds)."""
        # vLLM reads its environment while it is imported.
        os.environ.update(_environment(self._spec))
        for variable in (ENDPOINT_VARIABLE, BASE_PORT_VARIABLE, WORKER_VARIABLE):
            os.environ.pop(variable, None)
        from vllm.config import KVEventsConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        from kvrouter.ray.engine.vllm_stats import CacheCounters
        from kvrouter.vllm.load_publisher import LoadPublisher

        events = kv_events_config(0, self._ports.kv_events, base_replay_port=self._ports.replay, topic=TOPIC)
        arguments = engine_arguments(self._spec.config, self._spec.rank)
        self._counters = CacheCounters()
        self._llm = AsyncLLM.from_engine_args(
            AsyncEngineArgs(**arguments, kv_events_config=KVEventsConfig(**events), worker_extension_cls=EXTENSION),
            stat_loggers=[
                self._counters,
                partial(LoadPublisher, endpoint=f"tcp://*:{self._ports.load}"),
            ],
        )
        self._guard = OrphanGuard()

    @property
    def block_size(self) -> int:
        """Tokens in a KV block."""
        return int(self._llm.vllm_config.cache_config.block_size)

    @property
    def max_model_len(self) -> int:
        """Most tokens of a prompt and what follows it."""
        return int(self._llm.vllm_config.model_config.max_model_len)

    async def generate(self, request: SampleRequest) -> SampleResult:
        """One sample; see ``Engine.generate``."""
        from vllm.v1.engine.exceptions import EngineDeadError as VllmEngineDeadError

        room = self.max_model_len - len(request.tokens)
        began = time.perf_counter()
        tokens: list[int] = []
        logprobs: list[float] = []
        text: list[str] = []
        cached, truncated, first = 0, False, 0.0
        if room <= 0:  # as NeMo-RL: the prompt comes back as it was
            return SampleResult(np.empty(0, np.int64), np.empty(0, np.float32), False, 0, "")
        outputs = self._llm.generate(
            {"prompt_token_ids": request.tokens.tolist()},
            self._sampling(request, room),
            request_id=f"{self._spec.rank}-{next(self._numbers)}",
        )
        try:
            async for output in outputs:
                completion = output.outputs[0]
                if completion.token_ids and not tokens:
                    first = time.perf_counter() - began
                tokens += completion.token_ids
                logprobs += [
                    step[token].logprob
                    for token, step in zip(completion.token_ids, completion.logprobs or (), strict=False)
                ]
                text.append(completion.text)
                cached = output.num_cached_tokens if output.num_cached_tokens is not None else cached
                truncated = completion.finish_reason == "length"
        except VllmEngineDeadError as error:
            raise EngineDeadError(str(error)) from None
        return SampleResult(
            np.asarray(tokens, dtype=np.int64),
            np.asarray(logprobs, dtype=np.float32),
            truncated,
            max(cached, 0),
            "".join(text) if request.want_text else None,
            ttft_s=first,
            duration_s=time.perf_counter() - began,
        )

    def _sampling(self, request: SampleRequest, room: int) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        config = self._spec.config
        limit = config["max_new_tokens"] if request.max_new_tokens is None else request.max_new_tokens
        stop = [*(config.get("stop_strings") or ()), *request.stop_strings]
        top_k = config.get("top_k")
        return SamplingParams(
            temperature=0.0 if request.greedy else config.get("temperature", 1.0),
            top_p=config.get("top_p", 1.0),
            top_k=-1 if top_k is None or request.greedy else top_k,
            max_tokens=min(limit, room),
            stop_token_ids=list(config.get("stop_token_ids") or ()),
            stop=stop or None,
            include_stop_str_in_output=True,
            ignore_eos=bool(config.get("ignore_eos", False)),
            seed=request.seed,
            logprobs=0,
            detokenize=request.want_text or bool(stop),
            output_kind=RequestOutputKind.DELTA,
        )

    async def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text."""
        tokenizer = self._llm.get_tokenizer()
        return [list(tokenizer.encode(text)) for text in texts]

    async def reset_prefix_cache(self, preempt_running: bool) -> bool:
        """Forgets every cached prefix."""
        return bool(await self._alive(self._llm.reset_prefix_cache(reset_running_requests=preempt_running)))

    async def cache_counters(self) -> tuple[int, int]:
        """Looked-up and hit tokens so far."""
        return self._counters.queries, self._counters.hits

    async def pause(self) -> None:
        """Freezes all requests where they are."""
        await self._alive(self._llm.pause_generation(mode="keep", clear_cache=False))

    async def resume(self) -> None:
        """Goes on with them."""
        await self._alive(self._llm.resume_generation())

    async def load_weights(self, source: WeightSource) -> None:
        """Every rank reads the checkpoint; a state dict reaches them as a file in shared memory."""
        if source.path is not None:
            await self._call("kvrouter_load_weights", source.path)
        elif source.state_dict is not None:
            # Written and removed in a thread: gigabytes must not stop the loop that answers health checks.
            with_file = state_dict_file(source.state_dict)
            path = await asyncio.to_thread(with_file.__enter__)
            try:
                await self._call("kvrouter_load_weights", path)
            finally:
                await asyncio.to_thread(with_file.__exit__, None, None, None)

    async def init_collective(self, host: str, port: int, first_rank: int, world_size: int) -> None:
        """Joins the group in which weights are broadcast."""
        await self._call("kvrouter_init_collective", host, port, first_rank, world_size)

    async def receive_weights(self, info: Mapping[str, tuple[Sequence[int], str]]) -> None:
        """Takes part in a broadcast of weights."""
        await self._call("kvrouter_receive_weights", [(name, *shape) for name, shape in info.items()])

    async def _call(self, method: str, *args: Any) -> None:
        await self._alive(self._llm.collective_rpc(method, args=args))

    async def _alive(self, call: Any) -> Any:
        from vllm.v1.engine.exceptions import EngineDeadError as VllmEngineDeadError

        try:
            return await call
        except VllmEngineDeadError as error:
            raise EngineDeadError(str(error)) from None

    async def sleep(self, level: int) -> None:
        """Gives its GPU memory back (vLLM's sleep mode; ``colocated.enabled``)."""
        await self._alive(self._llm.sleep(level=level))

    async def wake_up(self, tags: Sequence[str] | None) -> None:
        """Takes its GPU memory again."""
        await self._alive(self._llm.wake_up(tags=list(tags) if tags else None))

    async def check_health(self) -> None:
        """Raises EngineDeadError when the engine's processes are gone."""
        await self._alive(self._llm.check_health())

    async def stop(self) -> None:
        """Ends the engine's processes."""
        if self._llm is not None:
            self._llm.shutdown()
            self._llm = None
        if self._guard is not None:
            self._guard.release()
            self._guard = None


def _environment(spec: EngineSpec) -> dict[str, str]:
    """What vLLM is to find in its environment; ``vllm_cfg.env_vars`` goes before all of it."""
    env = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    # Block hashes have to be the same from run to run.
    env["PYTHONHASHSEED"] = os.environ.get("PYTHONHASHSEED", "0")
    if Path(str(spec.config["model_name"])).is_dir():
        env["HF_HUB_OFFLINE"] = "1"
    if is_cpu_vllm():
        env["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, _cores(spec)))
        if spec.config.get("vllm_cfg", {}).get("enforce_eager", False):
            # The sampler's helpers would still be compiled, by a C++ compiler, within the first request: 19 s.
            env["TORCHDYNAMO_DISABLE"] = "1"
        env["VLLM_CPU_KVCACHE_SPACE"] = os.environ.get("VLLM_CPU_KVCACHE_SPACE", str(_CPU_CACHE_GIB))
    else:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(spec.devices)
    env.update({str(name): str(value) for name, value in spec.config.get("vllm_cfg", {}).get("env_vars", {}).items()})
    return env


def _cores(spec: EngineSpec) -> list[int]:
    """A core for each rank, as far from the others' on this host as there are cores."""
    cores = sorted(os.sched_getaffinity(0))
    size = model_parallel_size(spec.config)
    first, count = spec.index_on_host * size, spec.workers_on_host * size
    return [spread_core(first + rank, count, cores) for rank in range(size)]
