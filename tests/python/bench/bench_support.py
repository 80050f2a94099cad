"""Real little HTTP servers that stand where a worker or the router would, and misbehave when told to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import numpy as np
from aiohttp import web

from kvrouter.bench.client import RequestRecord
from kvrouter.bench.runner import BenchResult, WorkloadResult
from kvrouter.bench.settings import BenchSettings, EngineName, WorkloadName
from kvrouter.bench.stats import summarize
from kvrouter.bench.workloads import BenchRequest, TokenArray

BLOCK_SIZE = 4


def plain_hasher(tokens: TokenArray, block_size: int) -> np.ndarray:
    """One number a full block: enough for a client, which only passes them on."""
    blocks = len(tokens) // block_size
    return tokens[: blocks * block_size].reshape(blocks, block_size).astype(np.uint64).sum(axis=1)


def request(index: int = 0, num_tokens: int = 10, max_tokens: int = 3) -> BenchRequest:
    return BenchRequest(index, index, np.arange(3, 3 + num_tokens, dtype=np.uint32), max_tokens, 0.0, 7)


class Server:
    """An aiohttp application on a free port of the loopback interface."""

    def __init__(self) -> None:
        self.app = web.Application()
        self.url = ""
        self._runner: web.AppRunner

    async def __aenter__(self):
        self._runner = web.AppRunner(self.app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()


class Worker(Server):
    """Streams completions as vLLM does. `fault` is asked before each answer and names what goes wrong, if anything."""

    def __init__(self, cached_tokens: int | None = 4, fault: Callable[[int], str | None] = lambda _: None) -> None:
        super().__init__()
        self.cached_tokens = cached_tokens
        self.fault = fault
        self.first_token_delay_s = 0.0
        self.bodies: list[dict[str, Any]] = []
        self.running = 0
        self.most_running = 0
        self.app.router.add_post("/v1/completions", self._complete)

    async def _complete(self, http: web.Request) -> web.StreamResponse:
        body = await http.json()
        self.bodies.append(body)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            return await self._answer(http, body, self.fault(len(self.bodies) - 1))
        finally:
            self.running -= 1

    async def _answer(self, http: web.Request, body: dict[str, Any], fault: str | None) -> web.StreamResponse:
        if fault == "reset":
            assert http.transport is not None
            http.transport.abort()
            return web.Response()
        if fault in ("400", "500"):
            return web.json_response({"error": {"message": "so it is"}}, status=int(fault))
        if fault == "hang":
            await asyncio.sleep(30)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(http)

        async def event(value: Any) -> None:
            await response.write(b"data: " + json.dumps(value).encode() + b"\n\n")

        await asyncio.sleep(self.first_token_delay_s)
        for count in range(body["max_tokens"]):
            await event({"choices": [{"index": 0, "text": f"w{count} "}]})
            if fault == "reset mid-stream":
                assert http.transport is not None
                http.transport.abort()
                return response
            if fault == "error in stream":
                await event({"error": {"message": "engine is dead"}})
                return response
            if fault == "garbage":
                await response.write(b"data: {not json\n\n")
                return response
        if fault != "ends early":
            usage: dict[str, Any] = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
            if self.cached_tokens is not None:
                usage["prompt_tokens_details"] = {"cached_tokens": self.cached_tokens}
            await event({"choices": [], "usage": usage})
            await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response


class Router(Server):
    """Answers what `decide` says: a JSON value, or an HTTP status for a refusal."""

    def __init__(self, decide: Callable[[int], Any]) -> None:
        super().__init__()
        self.decide = decide
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.app.router.add_post("/{name}", self._answer)

    async def _answer(self, http: web.Request) -> web.StreamResponse:
        self.bodies.append(await http.json())
        self.paths.append(http.path)
        answer = self.decide(len(self.bodies) - 1)
        if answer == "hang":
            await asyncio.sleep(30)
        if isinstance(answer, int):
            return web.json_response({"error": "no"}, status=answer)
        if isinstance(answer, str):
            return web.Response(text=answer)
        return web.json_response(answer)


def record(index: int, worker: int | None, ttft_ms: float = 10.0, **extra: Any) -> RequestRecord:
    answered = worker is not None
    return RequestRecord(
        index,
        index % 4,
        worker=worker,
        prompt_tokens=100,
        completion_tokens=16 if answered else 0,
        router_us=200.0 + index,
        hash_us=20.0,
        ttft_ms=ttft_ms if answered else None,
        latency_ms=ttft_ms * 3 if answered else None,
        attempts=1,
        **extra,
    )


def bench_result(names: list[str], repeats: int = 1, num_workers: int = 2, failed: int = 0) -> BenchResult:
    """A result with plausible, different figures for both modes."""
    results = []
    for name in names:
        result = WorkloadResult(name)
        for repeat in range(repeats):
            for mode, hit_rate, ttft in (("round_robin", 0.31, 250.0), ("kv_aware", 0.79, 60.0)):
                records = [
                    record(i, None if i < failed else i % num_workers, ttft * (1 + i / 40) + repeat) for i in range(40)
                ]
                wall_s = (9.0 if mode == "round_robin" else 4.5) + repeat
                result.runs[mode].append(
                    summarize(
                        records,
                        wall_s=wall_s,
                        hit_rate=hit_rate + repeat / 100,
                        num_workers=num_workers,
                        block_size=BLOCK_SIZE,
                    )
                )
                result.records[mode] += records
        results.append(result)
    workload = names[0] if len(names) == 1 else "all"
    settings = BenchSettings(
        engine=EngineName.SIM, workload=WorkloadName(workload), repeats=repeats, num_workers=num_workers
    )
    return BenchResult(settings, results, {"versions": {}, "machine": {"cores": 2}, "command": "test"})
