"""Policies beside each other on real workers: the same requests under each, caches emptied in between.

The router runs in this process and is told of completions, as ``kvrouter`` users do through tickets.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

if TYPE_CHECKING:
    from kvrouter.simulate.workloads import RequestList

logger = logging.getLogger("kvrouter.bench")

EXIT_FAILED, EXIT_USAGE = 1, 2
#: Tokens of each prompt, and of them the shared prefix: what the policies' table in docs/policies.md is about.
PROMPT, PREFIX = 1600, 1536
WORKLOADS = ("thrash", "hot", "group", "grpo_burst", "grpo_batch")


@dataclass(frozen=True)
class Load:
    """Requests, and how they are sent: by users, or (0 users) all at once, decided one by one or in one batch."""

    name: str
    tokens: list[Any]
    max_tokens: list[int]
    users: int
    batch: bool = False

    def as_requests(self) -> RequestList:
        """The same for the fleet simulator: prompts that share what these share."""
        from kvrouter.simulate.workloads import RequestList

        def seed(part: Any) -> int:
            return int.from_bytes(hashlib.blake2b(part.tobytes(), digest_size=8).digest(), "little")

        requests = RequestList(self.name, users=self.users)
        for tokens, output in zip(self.tokens, self.max_tokens, strict=True):
            parts = (tokens[:PREFIX], tokens[PREFIX:])
            requests.add([(seed(part), len(part)) for part in parts], output)
        return requests


def make_load(name: str, num_workers: int, num_blocks: int, scale: float, seed: int, users: int = 4) -> Load:
    """The requests of a workload.

    thrash: 32 prefixes for two workers of 448 blocks (6/7 of the fleet's caches), six rounds, shuffled.  hot: 80% share
    one prefix.  group: 16 samples of a prompt, one prompt after the other.  grpo_burst: the same prompts at once, with
    outputs of long-tailed length, each request decided when it comes.  grpo_batch: the same, decided in one call.
    """
    from kvrouter.bench.workloads import Group, Thrash, thrash_num_prefixes

    count = max(16, round(192 * scale))
    burst = name in ("grpo_burst", "grpo_batch")
    rng = np.random.default_rng([seed, *(b"grpo_burst" if burst else name.encode())])
    if name == "thrash":
        prefixes = thrash_num_prefixes(num_blocks, num_workers, 64, PREFIX)
        requests = Thrash(count, PROMPT, 16, seed=seed, num_prefixes=prefixes, prefix_len=PREFIX).requests()
    elif name == "hot":
        requests = Thrash(count, PROMPT, 16, seed=seed, num_prefixes=16, prefix_len=PREFIX).requests()
        hot = requests[0].tokens[:PREFIX]
        for request in requests:
            if rng.random() < 0.8:
                request.tokens[:PREFIX] = hot
    elif name in ("group", "grpo_burst", "grpo_batch"):
        requests = Group(count, PROMPT, 16, seed=seed, group_size=16, temperature=1.0).requests()
    else:
        raise ValueError(f"workload '{name}' is unknown; there are: {', '.join(WORKLOADS)}")
    lengths = [16] * len(requests)
    if burst:
        lengths = np.clip(rng.lognormal(np.log(24), 0.9, len(requests)), 4, 192).astype(int).tolist()
    return Load(name, [request.tokens for request in requests], lengths, 0 if burst else users, name == "grpo_batch")


class PolicyRun:
    """A router with a policy, and loads served under it."""

    def __init__(self, fleet: Any, policy: str, seed: int) -> None:
        from kvrouter import KvRouter

        self._fleet = fleet
        self._urls = [worker.url for worker in fleet.workers]
        self._router = KvRouter(
            num_workers=len(fleet.workers),
            base_kv_events_port=fleet.workers[0].kv_events_port,
            base_metrics_port=fleet.workers[0].metrics_port,
            policy=policy,
            seed=seed,
        )

    def __call__(self, load: Load) -> dict[str, float]:
        """Serves the load with empty caches; returns its figures (the keys of a row of compare_policies())."""
        with self._router as router:
            _eventually(lambda: all(w["state"] == "up" for w in router.status()["workers"]), "the router's connections")
            _reset(self._fleet, router)
            before = [_counters(url) for url in self._urls]
            began = time.perf_counter()
            ttft, served = asyncio.run(self._serve(load))
            seconds = time.perf_counter() - began
            after = [_counters(url) for url in self._urls]
        hits = sum(b[0] - a[0] for a, b in zip(before, after, strict=True))
        queries = sum(b[1] - a[1] for a, b in zip(before, after, strict=True))
        return {
            "seconds": seconds,
            "requests_per_s": len(load.tokens) / seconds,
            "hit_rate": hits / max(queries, 1),
            "ttft_p99_s": float(np.percentile(ttft, 99)),
            "imbalance": max(served) * len(served) / max(sum(served), 1),
        }

    def _choose(self, tokens: Any) -> tuple[int, int]:
        """Worker and ticket."""
        decision = self._router.route(tokens)
        return decision.worker, decision.ticket

    def _choose_batch(self, tokens: list[Any]) -> list[tuple[int, int]]:
        workers, _, tickets = self._router.dispatch_batch(tokens)
        return [(int(worker), int(ticket)) for worker, ticket in zip(workers, tickets, strict=True)]

    async def _serve(self, load: Load) -> tuple[list[float], list[int]]:
        import aiohttp

        ttft: list[float] = []
        served = [0] * len(self._urls)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(600)) as session:

            async def send(index: int, worker: int, ticket: int, began: float) -> None:
                body = {
                    "model": self._fleet.model, "prompt": load.tokens[index].tolist(),
                    "max_tokens": load.max_tokens[index], "temperature": 1.0,
                    "ignore_eos": True, "stream": True,
                }  # fmt: skip
                first = 0.0
                try:
                    async with session.post(f"{self._urls[worker]}/v1/completions", json=body) as response:
                        response.raise_for_status()
                        async for line in response.content:
                            if not first and line.startswith(b"data:"):
                                first = time.perf_counter()
                                self._router.first_token(ticket)
                finally:
                    self._router.complete(ticket, load.max_tokens[index])
                ttft.append(first - began)
                served[worker] += len(load.tokens[index]) + load.max_tokens[index]

            if load.users == 0:
                began = time.perf_counter()
                chosen = self._choose_batch(load.tokens) if load.batch else map(self._choose, load.tokens)
                await asyncio.gather(*(send(i, *choice, began) for i, choice in enumerate(chosen)))
            else:
                queue = iter(range(len(load.tokens)))

                async def user() -> None:
                    for index in queue:
                        began = time.perf_counter()
                        await send(index, *self._choose(load.tokens[index]), began)

                await asyncio.gather(*(user() for _ in range(load.users)))
        return ttft, served


def _eventually(condition: Callable[[], bool], what: str, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what}: not there after {timeout_s:.0f} s")
        time.sleep(0.02)


def _reset(fleet: Any, router: Any) -> None:
    """Empties the workers' caches; their last requests may end a moment after the answers."""

    def done() -> bool:
        with contextlib.suppress(RuntimeError):
            fleet.reset_prefix_caches()
            return True
        return False

    _eventually(done, "an empty cache")
    router.reset()


def _counters(url: str) -> tuple[float, float]:
    from kvrouter.bench import counters

    reading = counters.scrape(url)
    return float(reading.hits), float(reading.queries)


def compare_policies(
    policies: Sequence[str], workloads: Sequence[str], *, engine: str = "vllm", num_workers: int = 2,
    num_blocks: int = 448, repeats: int = 3, scale: float = 1.0, seed: int = 42,
    on_run: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Every policy on every workload, ``repeats`` times, policies taking turns; a row each run.

    Raises ValueError for names that are unknown, RuntimeError when workers do not start.
    """
    from kvrouter import policy_names
    from kvrouter.vllm import launch_workers

    unknown = [policy for policy in policies if policy not in policy_names()]
    if unknown:
        raise ValueError(f"policy '{unknown[0]}' is unknown; there are: {', '.join(policy_names())}")
    for name in workloads:
        make_load(name, num_workers, num_blocks, scale, seed)  # what does not fit is said before workers start
    rows = []
    with launch_workers(num_workers, engine=engine, num_gpu_blocks=num_blocks, max_model_len=2048) as fleet:
        # A router lives as long as the workers, as it does in training; each repeat has prompts of its own.
        runs = {policy: PolicyRun(fleet, policy, seed) for policy in policies}
        for run in runs.values():  # what workers and routers learn from their first requests is not measured
            run(make_load("grpo_burst", num_workers, num_blocks, 0.17, seed + repeats))
        for name in workloads:
            for repeat in range(repeats):
                load = make_load(name, num_workers, num_blocks, scale, seed + repeat)
                for i in range(len(policies)):
                    policy = policies[(i + repeat) % len(policies)]  # nobody is always first
                    row: dict[str, Any] = {"workload": name, "policy": policy, "repeat": repeat}
                    row |= runs[policy](load)
                    rows.append(row)
                    on_run(row)
    return rows


def bench_policies(
    policies: Annotated[str, typer.Option(help="Comma-separated policies, or 'all'.")] = "round_robin,linear,adaptive",
    workloads: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(WORKLOADS)}.")] = ",".join(WORKLOADS),
    engine: Annotated[str, typer.Option(help="vllm: real workers. sim: simulated ones.")] = "vllm",
    num_workers: Annotated[int, typer.Option(help="Workers to start.", min=1)] = 2,
    num_blocks: Annotated[int, typer.Option(help="KV blocks of each, of 64 tokens.", min=64)] = 448,
    repeats: Annotated[int, typer.Option(help="Runs of each policy and workload; medians count.", min=1)] = 3,
    scale: Annotated[float, typer.Option(help="Multiplies the number of requests (192).", min=0.05)] = 1.0,
    seed: Annotated[int, typer.Option(help="Of prompts and ties.", min=0)] = 42,
    output: Annotated[Path | None, typer.Option(help="File for the runs, a JSON line each.")] = None,
) -> None:
    """Compare policies on real workers: requests/s, hit rate and TTFT p99, medians over the repeats."""
    from rich.console import Console
    from rich.table import Table

    from kvrouter import policy_names

    console = Console()

    def on_run(row: dict[str, Any]) -> None:
        line = json.dumps(row)
        console.print(line, soft_wrap=True, highlight=False)
        if output is not None:  # at once: what was measured is kept when a later run fails
            with output.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text("", encoding="utf-8")
    chosen = policy_names() if policies == "all" else policies.split(",")
    names = workloads.split(",")
    try:
        rows = compare_policies(
            chosen, names, engine=engine, num_workers=num_workers, num_blocks=num_blocks, repeats=repeats,
            scale=scale, seed=seed, on_run=on_run,
        )  # fmt: skip
    except ValueError as error:
        console.print(f"[bold red]error:[/] {error}")
        raise typer.Exit(EXIT_USAGE) from None
    except RuntimeError as error:
        console.print(f"[bold red]error:[/] {error}")
        raise typer.Exit(EXIT_FAILED) from None
    table = Table(title=f"{num_workers} {engine} workers, medians of {repeats}: requests/s, hit rate, TTFT p99 [s]")
    table.add_column("workload")
    for policy in chosen:
        table.add_column(policy, justify="right")
    for name in names:
        cells = []
        for policy in chosen:
            runs = [row for row in rows if row["workload"] == name and row["policy"] == policy]
            rate, hits, ttft = (
                float(np.median([row[key] for row in runs])) for key in ("requests_per_s", "hit_rate", "ttft_p99_s")
            )
            cells.append(f"{rate:.2f}, {hits:.2f}, {ttft:.2f}")
        table.add_row(name, *cells)
    console.print(table)
