"""Two replicas of the service beside one: do they find as much in the caches, and share the load as evenly?

    python -m kvrouter.bench.replicas [--engine sim] [--workload thrash|burst] [--policy adaptive] [--repeats 5]

The same requests go by turns through one ``kvrouter serve``, through two that tell each other what they send where
(request by request the other one), and through two that do not.  ``thrash`` is that of docs/benchmark.md: prefixes that
fit the caches together but not one.  ``burst`` is a step of GRPO rollouts after the other: all samples of all prompts
of the step at once, each prompt's by turns to both replicas, new prompts every step.

Before each turn the caches are emptied, and the services start with nothing.  Hit rates and imbalance are the workers'
own counters: the imbalance is the prompt tokens of the worker that got most over the mean of all.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import median

from kvrouter.bench import counters
from kvrouter.bench.client import BenchClient
from kvrouter.bench.router_process import RouterAdmin, free_port, settled
from kvrouter.bench.settings import BenchSettings, EngineName, WorkloadName
from kvrouter.bench.workers import start_shallow_workers
from kvrouter.bench.workloads import BenchRequest, make_workloads
from kvrouter.serve import KvService, ServeOptions
from kvrouter.vllm import WorkerFleet
from kvrouter.worker_spec import WorkerSpec

ONE, TWO, TWO_APART = "one", "two", "two apart"
#: Seconds until workers must have been reached, events applied, caches emptied.
WAIT_S = 30.0


@dataclass
class Turns:
    """What the turns of one way gave, one figure a repeat.

    Attributes:
        hit_rate: prompt tokens taken from a cache / prompt tokens, in [0, 1].
        imbalance: prompt tokens of the worker that got most / mean over the workers, at least 1.
        requests_per_s: from the first request to the last answer.
    """

    hit_rate: list[float] = field(default_factory=list)
    imbalance: list[float] = field(default_factory=list)
    requests_per_s: list[float] = field(default_factory=list)


def compare(
    settings: BenchSettings, step_size: int | None, repeats: int, on_turn: Callable[[str, Turns], None]
) -> dict[str, Turns]:
    """Start workers, send the workload of ``settings`` each way ``repeats`` times, and stop all.

    step_size: requests that are sent at once, the next ones when all are answered; None: as many users as the settings
        say, each with its next request when it has its answer.
    on_turn: called after each turn with its way and what it gave so far.

    Raises:
        ValueError: settings that do not fit together.
        RuntimeError: workers did not start, or a request failed.
    """
    settings.validate()
    (workload,) = make_workloads(settings)
    requests = workload.requests()
    steps = [requests] if step_size is None else list(_chunks(requests, step_size))
    concurrency = step_size or settings.concurrency
    results = {ONE: Turns(), TWO: Turns(), TWO_APART: Turns()}
    with ExitStack() as stack:
        fleet = start_shallow_workers(settings, stack)
        urls = [worker.url for worker in fleet.workers]
        _send(settings, fleet, urls, [requests[: 2 * settings.num_workers]], concurrency)  # a worker's first is slow
        for repeat in range(repeats):
            for way in results if repeat % 2 == 0 else reversed(results):
                fleet.reset_prefix_caches(WAIT_S)
                with ExitStack() as turn:
                    services = [turn.enter_context(service) for service in _services(settings, fleet, way)]
                    for service in services:
                        _wait_until_ready(service, replicas=len(services) - 1 if way == TWO else 0)
                    before = [counters.scrape(url) for url in urls]
                    begin = time.perf_counter()
                    _send(settings, fleet, [service.url for service in services], steps, concurrency)
                    seconds = time.perf_counter() - begin
                    _settle(urls)
                    after = [counters.scrape(url) for url in urls]
                tokens = [a.queries - b.queries for b, a in zip(before, after, strict=True)]
                rate = counters.hit_rate(before, after)
                if rate is None:
                    raise RuntimeError("the workers counted no prompt tokens")
                results[way].hit_rate.append(rate)
                results[way].imbalance.append(max(tokens) * len(tokens) / sum(tokens))
                results[way].requests_per_s.append(len(requests) / seconds)
                on_turn(way, results[way])
    return results


def _chunks(requests: Sequence[BenchRequest], size: int) -> Iterator[Sequence[BenchRequest]]:
    for begin in range(0, len(requests), size):
        yield requests[begin : begin + size]


def _services(settings: BenchSettings, fleet: WorkerFleet, way: str) -> Iterator[KvService]:
    workers = [WorkerSpec(w.url, w.kv_events_endpoint, "", w.load_endpoint) for w in fleet.workers]
    endpoints = [f"tcp://127.0.0.1:{free_port('127.0.0.1')}" for _ in range(1 if way == ONE else 2)]
    for number, endpoint in enumerate(endpoints):
        yield KvService(
            ServeOptions(
                # Replicas need not number the workers alike.
                workers if number == 0 else workers[::-1],
                port=0,
                block_size=settings.block_size,
                policy=settings.policy,
                seed=settings.seed + number,
                replica_bind=endpoint if way == TWO else "",
                replica_peers=endpoints if way == TWO else [],
            )
        )


def _wait_until_ready(service: KvService, replicas: int) -> None:
    admin = RouterAdmin(service.url)
    deadline = time.monotonic() + WAIT_S
    while True:
        status = admin.workers()
        up = all(w["state"] == "up" and w["healthy"] and w["models"] for w in status["workers"])
        if up and status["replicas"]["live"] == replicas:
            return
        if time.monotonic() > deadline:
            raise RuntimeError(f"the service does not see its workers and replicas: {status}")
        time.sleep(0.05)


def _send(
    settings: BenchSettings,
    fleet: WorkerFleet,
    urls: Sequence[str],
    steps: Sequence[Sequence[BenchRequest]],
    concurrency: int,
) -> None:
    """All requests of a step in their order, request by request to the next URL; step after step."""

    async def main() -> None:
        async with BenchClient("", urls, block_size=settings.block_size, model=fleet.model) as client:
            for step in steps:
                queue = iter(enumerate(step))

                async def user(queue: Iterator[tuple[int, BenchRequest]] = queue) -> None:
                    for number, request in queue:
                        await client.send_to(number % len(urls), request)

                await asyncio.gather(*(user() for _ in range(concurrency)))

    asyncio.run(main())


def _settle(urls: Sequence[str]) -> None:
    """Until the workers' counters stand still."""
    if not settled(lambda: [counters.scrape(url) for url in urls], quiet_s=0.2, timeout_s=WAIT_S):
        raise RuntimeError(f"the workers' counters do not come to rest within {WAIT_S:g} s")


def main() -> None:
    """Compare, and print the three ways."""
    parser = argparse.ArgumentParser(prog="python -m kvrouter.bench.replicas", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--engine", choices=[name.value for name in EngineName], default="vllm", help="real vLLM, or the simulated one")
    add("--workload", choices=["thrash", "burst"], default="thrash", help="see above")
    add("--num-workers", type=int, default=2)
    add("--time-scale", type=float, default=1.0, help="the simulated worker's times are multiplied by this")
    add("--num-prefixes", type=int, help="thrash; default: as many as fill 6/7 of all caches")
    add("--num-requests", type=int, help="default: thrash six for each prefix, burst four steps")
    add("--prompts-per-step", type=int, default=12, help="burst: each with eight samples")
    add("--concurrency", type=int, default=4, help="thrash: users")
    add("--repeats", type=int, default=3, help="the order of the ways alternates")
    add("--policy", default="linear", help="of all routers")
    args = parser.parse_args()
    burst = args.workload == "burst"
    group_size = 8
    step_size = args.prompts_per_step * group_size if burst else None
    settings = BenchSettings(
        engine=EngineName(args.engine),
        workload=WorkloadName.GROUP if burst else WorkloadName.THRASH,
        num_workers=args.num_workers,
        time_scale=args.time_scale,
        num_prefixes=args.num_prefixes,
        num_requests=args.num_requests or (4 * step_size if step_size else None),
        group_size=group_size,
        concurrency=args.concurrency,
        policy=args.policy,
    )

    def on_turn(way: str, turns: Turns) -> None:
        print(f"{way:10} {100 * turns.hit_rate[-1]:.1f}%, imbalance {turns.imbalance[-1]:.3f}", flush=True)

    results = compare(settings, step_size, args.repeats, on_turn)
    print(f"{args.workload}, {args.policy}, {args.num_workers} {args.engine} workers, medians of {args.repeats}")
    for way, turns in results.items():
        rates, imbalance = turns.hit_rate, turns.imbalance
        print(
            f"{way:10} hit rate {100 * median(rates):.1f}% ({100 * min(rates):.1f} to {100 * max(rates):.1f}), "
            f"imbalance {median(imbalance):.3f} ({min(imbalance):.3f} to {max(imbalance):.3f}), "
            f"{median(turns.requests_per_s):.1f} requests/s"
        )
    for way in (TWO, TWO_APART):
        points = 100 * (median(results[way].hit_rate) - median(results[ONE].hit_rate))
        percent = 100 * (median(results[way].imbalance) / median(results[ONE].imbalance) - 1)
        print(f"{way} against one: hit rate {points:+.2f} points, imbalance {percent:+.1f}%")


if __name__ == "__main__":
    main()
