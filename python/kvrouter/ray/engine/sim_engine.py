"""The simulated worker as the engine of a generation worker: real KV events and load, no model.

It is asked over HTTP on the loopback, as any client of it is (see docs/sim.md).  Its tokens follow from prompt and seed
alone; each has probability one, so its logprobs are 0.  Weights it has none: updates only count as versions.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp
import numpy as np

from kvrouter._core import sim_tokenize
from kvrouter.ray.config import DEFAULT_SIM_MODEL_LEN, router_block_size
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
from kvrouter.sim import SimWorker

_LINE_LIMIT = 1 << 22  # bytes of one event of a stream


class SimulatedEngine(Engine):
    """One ``SimWorker`` inside this process."""

    def __init__(self, spec: EngineSpec, ports: EnginePorts) -> None:
        self._spec = spec
        options = {"max_model_len": DEFAULT_SIM_MODEL_LEN, **spec.config.get("sim_cfg", {})}
        max_model_len = spec.config.get("vllm_cfg", {}).get("max_model_len")
        if max_model_len is not None:
            options["max_model_len"] = max_model_len
        options.setdefault("block_size", router_block_size(spec.config))
        self._options: dict[str, Any] = options
        self._ports = ports
        self._worker: SimWorker | None = None
        self._session: aiohttp.ClientSession | None = None
        self._url = ""

    async def start(self) -> None:
        """Starts the worker's two threads."""
        self._worker = SimWorker(
            kv_events_endpoint=f"tcp://*:{self._ports.kv_events}",
            replay_endpoint=f"tcp://*:{self._ports.replay}",
            load_endpoint=f"tcp://*:{self._ports.load}",
            topic=TOPIC,
            **self._options,
        )
        self._url = f"http://127.0.0.1:{self._worker.port}"
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None),
            read_bufsize=_LINE_LIMIT,
        )

    @property
    def block_size(self) -> int:
        """Tokens in a KV block."""
        return int(self._options["block_size"])

    @property
    def max_model_len(self) -> int:
        """Most tokens of a prompt and what follows it."""
        return int(self._options["max_model_len"])

    async def generate(self, request: SampleRequest) -> SampleResult:
        """One sample; see ``Engine.generate``."""
        config = self._spec.config
        limit = config["max_new_tokens"] if request.max_new_tokens is None else request.max_new_tokens
        room = self.max_model_len - len(request.tokens)
        if room <= 0:
            return SampleResult(np.empty(0, np.int64), np.empty(0, np.float32), False, 0, "")
        body = {
            "prompt": request.tokens.tolist(),
            "max_tokens": min(limit, room),
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            "seed": request.seed or 0,
        }
        began = time.perf_counter()
        tokens: list[int] = []
        text: list[str] = []
        cached, first = 0, 0.0
        async for event in self._events(body):
            for choice in event["choices"]:
                if not tokens:
                    first = time.perf_counter() - began
                tokens += choice["token_ids"]
                text.append(choice["text"])
            if event.get("usage"):
                cached = event["usage"]["prompt_tokens_details"]["cached_tokens"]
        generated = np.asarray(tokens, dtype=np.int64)
        return SampleResult(
            generated,
            np.zeros(len(generated), dtype=np.float32),
            True,  # no request of the simulated worker ends before its limit
            cached,
            "".join(text) if request.want_text else None,
            ttft_s=first,
            duration_s=time.perf_counter() - began,
        )

    async def _events(self, body: Mapping[str, Any]) -> Any:
        session = self._live_session()
        try:
            async with session.post(f"{self._url}/v1/completions", json=body) as response:
                if response.status != 200:
                    text = await response.text()
                    try:
                        message = json.loads(text)["error"]["message"]
                    except (ValueError, KeyError, TypeError):
                        message = text
                    raise ValueError(message)
                async for line in response.content:
                    if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
                        yield json.loads(line[6:])
        except aiohttp.ClientError as error:
            raise EngineDeadError(f"the simulated worker does not answer: {error}") from None

    async def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text: ``w123`` is token 123, any other word a hash."""
        return [sim_tokenize(text, int(self._options.get("vocab_size", 1024))) for text in texts]

    async def reset_prefix_cache(self, preempt_running: bool) -> bool:
        """Forgets every cached prefix."""
        parameters = {"reset_running_requests": "true"} if preempt_running else {}
        session = self._live_session()
        try:
            async with session.post(f"{self._url}/reset_prefix_cache", params=parameters) as response:
                return bool((await response.json(content_type=None))["success"])
        except aiohttp.ClientError as error:
            raise EngineDeadError(f"the simulated worker does not answer: {error}") from None

    async def cache_counters(self) -> tuple[int, int]:
        """Looked-up and hit tokens so far, by the worker's own /metrics."""
        from kvrouter.bench.counters import parse_counters

        async with self._live_session().get(f"{self._url}/metrics") as response:
            counters = parse_counters(await response.text())
        return int(counters.queries), int(counters.hits)

    async def pause(self) -> None:
        """Its tokens depend on no weights: there is nothing to wait for."""

    async def resume(self) -> None:
        """See ``pause``."""

    async def load_weights(self, source: WeightSource) -> None:
        """Nothing to load."""

    async def init_collective(self, host: str, port: int, first_rank: int, world_size: int) -> None:
        """No group: there are no weights to receive."""
        raise RuntimeError("the simulated engine has no weights to broadcast to: use update_weights, or engine='vllm'")

    async def receive_weights(self, info: Mapping[str, tuple[Sequence[int], str]]) -> None:
        """See ``init_collective``."""
        raise RuntimeError("the simulated engine has no weights to broadcast to: use update_weights, or engine='vllm'")

    async def sleep(self, level: int) -> None:
        """It holds no GPU memory; as vLLM's, its prefix cache is gone after it."""
        await self.reset_prefix_cache(preempt_running=True)

    async def wake_up(self, tags: Sequence[str] | None) -> None:
        """Nothing to take back."""

    async def check_health(self) -> None:
        """Raises EngineDeadError when it was stopped."""
        self._live_session()

    def _live_session(self) -> aiohttp.ClientSession:
        if self._session is None or self._worker is None:
            raise EngineDeadError("the simulated worker is stopped")
        return self._session

    async def stop(self) -> None:
        """Ends the worker."""
        if self._session is not None:
            await self._session.close()
            self._session = None
        if self._worker is not None:
            self._worker.stop()
            self._worker = None
