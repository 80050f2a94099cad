"""The step times of workers that are up, as a profile for the fleet simulator.

A few requests are sent to every worker at once (they share the machine, as they will later) and timed one by one; each
time is a sum of step terms, and the terms are what solves the sums best.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import aiohttp
import numpy as np

from kvrouter.simulate.profiles import Profile

_COLD = (256, 640, 1024, 1600)  # tokens of prompts that nothing of is cached
_CACHED, _NEW = 1536, 64  # tokens of prompts that most of is cached
_DECODE = 32  # tokens generated, by so many requests at once
_TOGETHER = (1, 2, 4)
_ROUNDS = 3


@dataclass(frozen=True)
class Calibration:
    """A profile, and seconds that a request takes beside its steps (HTTP, tokenizing, the client)."""

    profile: Profile
    request_s: float


async def _complete(session: aiohttp.ClientSession, url: str, model: str, prompt: Sequence[int], tokens: int) -> float:
    body = {
        "model": model, "prompt": list(prompt), "max_tokens": tokens, "temperature": 1.0, "ignore_eos": True,
        "stream": True,
    }  # fmt: skip
    began = time.perf_counter()
    async with session.post(f"{url}/v1/completions", json=body) as response:
        response.raise_for_status()
        await response.read()
    return time.perf_counter() - began


def _terms(count: int, cached: int, new: int, decode: int) -> list[float]:
    """What ``count`` requests at once come to: requests, steps, and of these tokens and pairs of prefill, tokens and
    pairs of decode."""
    context = cached + new
    return [
        1, decode, count * new, count * (new * cached + new * (new + 1) / 2),
        count * (decode - 1), count * sum(context + i for i in range(1, decode)),
    ]  # fmt: skip


async def _measure(
    urls: Sequence[str], model: str, vocab_size: int, seed: int
) -> tuple[list[list[float]], list[float], list[float]]:
    """Rows of _terms(), the seconds that each took, and weights."""
    rng = np.random.default_rng(seed)

    def prompt(length: int) -> list[int]:
        return [int(token) for token in rng.integers(3, vocab_size, length)]

    rows: list[list[float]] = []
    seconds: list[float] = []
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(300)) as session:

        async def everywhere(prompts: Sequence[list[int]], tokens: int) -> float:
            """The mean over workers of the time until all of these requests, sent at once, are answered."""

            async def one(url: str) -> float:
                times = await asyncio.gather(*(_complete(session, url, model, ids, tokens) for ids in prompts))
                return max(times)

            return float(np.mean(await asyncio.gather(*(one(url) for url in urls))))

        async def row(count: int, cached: int, new: int, decode: int) -> None:
            prefixes = [prompt(cached) for _ in range(count)] if cached else [[]] * count
            for prefix in prefixes if cached else ():
                await everywhere([[*prefix, *prompt(1)]], 1)
            taken = [await everywhere([[*prefix, *prompt(new)] for prefix in prefixes], decode) for _ in range(_ROUNDS)]
            rows.append(_terms(count, cached, new, decode))
            seconds.append(float(np.median(taken)))

        for _ in range(2):
            await everywhere([prompt(_COLD[-1])], 4)  # the first requests take longer
        for length in _COLD:
            await row(1, 0, length, 1)
        for count in _TOGETHER:
            await row(count, 0, _NEW, _DECODE)
            await row(count, _CACHED, _NEW, _DECODE)
        await row(1, _CACHED, _NEW, 1)
    return rows, seconds, [1 / value for value in seconds]


def calibrate(urls: Sequence[str], model: str, base: Profile, *, seed: int = 0) -> Calibration:
    """Times the workers and fits the terms of the step time (see Profile), and what a request takes beside them.

    urls: of the workers, which must be idle; their caches should be emptied afterwards.
    base: the workers' settings (blocks, batch sizes, vocabulary), whose times are replaced.
    Raises aiohttp.ClientError when a worker does not answer.
    """
    rows, seconds, weights = asyncio.run(_measure(urls, model, base.vocab_size, seed))
    terms = _non_negative(np.array(rows), np.array(seconds), np.array(weights))
    request_s, step_s, token_s, pair_s, sequence_s, decode_pair_s = (float(term) for term in terms)
    profile = replace(
        base,
        step_s=step_s,
        weights_s=0.0,
        prefill_token_s=token_s,
        attention_pair_s=pair_s,
        decode_sequence_s=sequence_s,
        decode_pair_s=decode_pair_s,
    )
    return Calibration(profile, request_s)


def _non_negative(rows: Any, seconds: Any, weights: Any) -> Any:
    """Weighted least squares; terms that would be negative are left out, the most negative first."""
    used = list(range(rows.shape[1]))
    while True:
        solution, *_ = np.linalg.lstsq(rows[:, used] * weights[:, None], seconds * weights, rcond=None)
        if (solution >= 0).all() or len(used) == 1:
            break
        used.pop(int(np.argmin(solution * rows[:, used].mean(axis=0))))
    terms = np.zeros(rows.shape[1])
    terms[used] = np.maximum(solution, 0)
    return terms
