"""Closed-loop users: each asks the router, streams from the chosen worker, and only then sends its next request.

Times start when a user has the request in hand: time to first token and latency include routing and retries.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import numpy as np
import numpy.typing as npt

from kvrouter.bench.workloads import BenchRequest, TokenArray

logger = logging.getLogger("kvrouter.bench")

BlockHasher = Callable[[TokenArray, int], npt.NDArray[np.uint64]]

ENDPOINTS = {"round_robin": "/find_worker_round_robin", "kv_aware": "/find_best_worker"}

#: A worker or router that failed is asked last (or not at all) for this long.
COOL_DOWN_S = 2.0
#: Shorter than the 5 s after which a vLLM server closes an idle connection, so that none dies as it is reused.
_KEEPALIVE_S = 2.0


class WorkerFailedError(Exception):
    """A worker did not answer a request; another may."""


class RequestRefusedError(Exception):
    """A worker found the request itself wrong (4xx); no other would take it."""


@dataclass(slots=True)
class RequestRecord:
    """What became of one request.

    Attributes:
        index, prefix_id: of the request.
        worker: who answered; None if nobody did.
        predicted_blocks: leading blocks that the router believed `worker` to hold; None if not the router's choice.
        prompt_tokens, cached_tokens, completion_tokens: the worker's own account; None where it gave none.
        hash_us: hashing the prompt, microseconds.
        router_us: hashing and the router's answer over HTTP, microseconds; None if it did not answer.
        ttft_ms, latency_ms: until the first and the last token, milliseconds.
        attempts: workers tried.
        error: why nobody answered.
    """

    index: int
    prefix_id: int
    worker: int | None = None
    predicted_blocks: int | None = None
    prompt_tokens: int = 0
    cached_tokens: int | None = None
    completion_tokens: int = 0
    hash_us: float = 0.0
    router_us: float | None = None
    ttft_ms: float | None = None
    latency_ms: float | None = None
    attempts: int = 0
    error: str | None = None


@dataclass(slots=True)
class _Answer:
    prompt_tokens: int
    cached_tokens: int | None
    completion_tokens: int
    first_token_at: float


class BenchClient:
    """Sends requests by way of a router; an async context manager, which may be entered again in a later event loop.

    A worker that fails is warned of once and its request goes to the next; a router that fails is warned of once
    and done without (round robin). Both are tried again after `COOL_DOWN_S`.
    """

    def __init__(
        self,
        router_url: str,
        worker_urls: Sequence[str],
        *,
        block_size: int,
        model: str,
        router_timeout_s: float = 1.0,
        request_timeout_s: float = 120.0,
        hasher: BlockHasher | None = None,
    ) -> None:
        if not worker_urls:
            raise ValueError("worker_urls is empty")
        if hasher is None:
            from kvrouter import compute_block_hashes

            hasher = compute_block_hashes
        self._router_url = router_url.rstrip("/")
        self._worker_urls = [url.rstrip("/") for url in worker_urls]
        self._block_size = block_size
        self._model = model
        self._router_timeout = aiohttp.ClientTimeout(total=router_timeout_s)
        self._request_timeout = aiohttp.ClientTimeout(total=request_timeout_s)
        self._hasher: BlockHasher = hasher
        self._local_turn = itertools.count()
        self._router_down_until = 0.0
        self._router_warned = False
        self._down_until = [0.0] * len(self._worker_urls)
        self._warned = [False] * len(self._worker_urls)
        self._session: aiohttp.ClientSession

    async def __aenter__(self) -> BenchClient:
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S)
        self._session = aiohttp.ClientSession(connector=connector)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def run(
        self,
        requests: Iterable[BenchRequest],
        mode: str,
        *,
        concurrency: int,
        on_done: Callable[[RequestRecord], None] = lambda _: None,
    ) -> list[RequestRecord]:
        """Answer `requests` in their order with `concurrency` users; `on_done` sees each record as it comes.

        Returns the records in the order of the requests.
        """
        endpoint = ENDPOINTS[mode]
        queue = iter(requests)
        records: list[RequestRecord] = []

        async def user() -> None:
            for request in queue:
                record = await self.send(request, endpoint)
                records.append(record)
                on_done(record)

        users = [asyncio.create_task(user()) for _ in range(concurrency)]
        try:
            await asyncio.gather(*users)
        finally:
            for task in users:
                task.cancel()
            await asyncio.gather(*users, return_exceptions=True)
        return sorted(records, key=lambda record: record.index)

    async def send(self, request: BenchRequest, endpoint: str) -> RequestRecord:
        """Route one request and stream its answer, trying other workers when one fails."""
        record = RequestRecord(request.index, request.prefix_id, prompt_tokens=len(request.tokens))
        payload = self._payload(request)
        start = time.perf_counter()
        tried: list[int] = []
        while len(tried) < len(self._worker_urls):
            choice, predicted = await self._choose(request, endpoint, record if not tried else None)
            worker = self._usable(choice, tried)
            tried.append(worker)
            record.attempts = len(tried)
            try:
                answer = await self._complete(worker, payload)
            except WorkerFailedError as failure:
                self._worker_failed(worker, str(failure))
                record.error = f"worker {worker}: {failure}"
                continue
            except RequestRefusedError as refusal:
                record.error = f"worker {worker}: {refusal}"
                return record
            end = time.perf_counter()
            self._worker_answered(worker)
            record.error = None
            record.worker = worker
            record.predicted_blocks = predicted if worker == choice else None
            record.prompt_tokens = answer.prompt_tokens
            record.cached_tokens = answer.cached_tokens
            record.completion_tokens = answer.completion_tokens
            record.ttft_ms = (answer.first_token_at - start) * 1e3
            record.latency_ms = (end - start) * 1e3
            return record
        return record

    async def send_to(self, worker: int, request: BenchRequest) -> None:
        """Send to `worker`, past the router, and forget the answer (to warm it up).

        Raises:
            WorkerFailedError, RequestRefusedError: it did not answer.
        """
        await self._complete(worker, self._payload(request))

    def _payload(self, request: BenchRequest) -> bytes:
        body = {
            "model": self._model,
            "prompt": request.tokens.tolist(),
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "seed": request.seed,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return json.dumps(body).encode()

    async def _choose(
        self, request: BenchRequest, endpoint: str, record: RequestRecord | None
    ) -> tuple[int, int | None]:
        """The worker for a request, and the blocks it is believed to hold; times go to `record`."""
        start = time.perf_counter()
        if start < self._router_down_until:
            return self._next_locally(), None
        hashes = self._hasher(request.tokens, self._block_size).tolist()
        hashed = time.perf_counter()
        try:
            async with self._session.post(
                self._router_url + endpoint,
                json={"local_hashes": hashes, "num_tokens": len(request.tokens)},
                timeout=self._router_timeout,
            ) as response:
                body = await response.text()
                if response.status != 200:
                    raise ValueError(f"status {response.status}: {body[:200]}")
            answer = json.loads(body)
            worker, overlap = answer["worker_id"], answer.get("overlap_blocks")
            if not isinstance(worker, int) or not 0 <= worker < len(self._worker_urls):
                raise ValueError(f"worker_id {worker!r} is not one of {len(self._worker_urls)} workers")
            if overlap is not None and not (isinstance(overlap, int) and 0 <= overlap <= len(hashes)):
                raise ValueError(f"overlap_blocks {overlap!r} is not in 0..{len(hashes)}")
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError, KeyError, TypeError) as error:
            self._router_failed(_reason(error))
            return self._next_locally(), None
        if self._router_warned:
            logger.warning("the router at %s answers again", self._router_url)
            self._router_warned = False
        if endpoint == ENDPOINTS["round_robin"]:
            overlap = None  # it looks at no cache, and predicts nothing
        if record is not None:
            record.hash_us = (hashed - start) * 1e6
            record.router_us = (time.perf_counter() - start) * 1e6
        return worker, overlap

    def _next_locally(self) -> int:
        return next(self._local_turn) % len(self._worker_urls)

    def _usable(self, choice: int, tried: Sequence[int]) -> int:
        """`choice`, or the next in turn that was not tried yet; workers that just failed come last."""
        now = time.perf_counter()
        count = len(self._worker_urls)
        in_turn = [w for w in ((choice + i) % count for i in range(count)) if w not in tried]
        return min(in_turn, key=lambda worker: now < self._down_until[worker])

    async def _complete(self, worker: int, payload: bytes) -> _Answer:
        try:
            async with self._session.post(
                f"{self._worker_urls[worker]}/v1/completions",
                data=payload,
                headers={"Content-Type": "application/json"},
                timeout=self._request_timeout,
            ) as response:
                if 400 <= response.status < 500:
                    raise RequestRefusedError(f"status {response.status}: {(await response.text())[:300]}")
                if response.status != 200:
                    raise WorkerFailedError(f"status {response.status}: {(await response.text())[:200]}")
                return await _read_stream(response.content)
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError, TypeError, AttributeError) as error:
            raise WorkerFailedError(_reason(error)) from error

    def _worker_failed(self, worker: int, reason: str) -> None:
        self._down_until[worker] = time.perf_counter() + COOL_DOWN_S
        if not self._warned[worker]:
            self._warned[worker] = True
            logger.warning(
                "worker %d (%s) failed: %s; its requests go to other workers", worker, self._worker_urls[worker], reason
            )

    def _worker_answered(self, worker: int) -> None:
        self._down_until[worker] = 0.0
        if self._warned[worker]:
            logger.warning("worker %d (%s) answers again", worker, self._worker_urls[worker])
            self._warned[worker] = False

    def _router_failed(self, reason: str) -> None:
        self._router_down_until = time.perf_counter() + COOL_DOWN_S
        if not self._router_warned:
            self._router_warned = True
            logger.warning("the router at %s failed: %s; going on round robin", self._router_url, reason)


async def _read_stream(content: aiohttp.StreamReader) -> _Answer:
    """Read a completion's server-sent events to their end.

    Raises:
        WorkerFailedError: the stream carries an error, or ends before its token counts.
        ValueError, TypeError: it is no such stream.
    """
    first_token_at = 0.0
    usage: Any = None
    async for line in content:
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            break
        event = json.loads(data)
        if not isinstance(event, dict):
            raise ValueError(f"not a completion event: {data[:100]!r}")
        if "error" in event:
            raise WorkerFailedError(f"error in the stream: {str(event['error'])[:200]}")
        if event.get("choices") and not first_token_at:
            first_token_at = time.perf_counter()
        usage = event.get("usage") or usage
    if not isinstance(usage, dict) or not first_token_at:
        raise WorkerFailedError("the stream ended early")
    details = usage.get("prompt_tokens_details") or {}
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    cached = details.get("cached_tokens")
    if not isinstance(prompt, int) or not isinstance(completion, int) or not isinstance(cached, int | None):
        raise ValueError(f"no token counts in {usage}")
    return _Answer(prompt, cached, completion, first_token_at)


def _reason(error: BaseException) -> str:
    if isinstance(error, asyncio.TimeoutError):
        return "no answer in time"
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"cannot connect ({os.strerror(error.os_error.errno) if error.os_error.errno else error.os_error})"
    if isinstance(error, aiohttp.ClientPayloadError):
        return "the connection was lost in mid-answer"
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return "it closed the connection"
    return str(error) or type(error).__name__
