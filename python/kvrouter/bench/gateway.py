"""The gateway beside a router in the client's own process: do the same requests find as much in the caches?

    python -m kvrouter.bench.gateway [--engine sim] [--repeats 3] [--concurrency 4]

Two workers, the workload ``thrash`` (prefixes that fit both caches together but not one: requests that are sent to the
wrong worker cost hits, see docs/benchmark.md).  Where a prefix goes first is chance (ties), and how many land on each
worker decides how many are lost: a run's hit rate varies by points, so compare over many, or with fewer prefixes.  By
turns the users ask a ``KvRouter`` in this process and send to the worker that it names, or send to a ``KvService``.
Before each turn the caches are emptied.  Hit rates are the workers' own counters.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import mean, median, stdev

from kvrouter import KvRouter
from kvrouter.bench import counters
from kvrouter.bench.client import BenchClient
from kvrouter.bench.router_process import RouterAdmin, settled
from kvrouter.bench.settings import BenchSettings, EngineName, WorkloadName
from kvrouter.bench.workers import start_shallow_workers
from kvrouter.bench.workloads import BenchRequest, make_workloads
from kvrouter.serve import KvService, ServeOptions
from kvrouter.vllm import WorkerFleet
from kvrouter.worker_spec import WorkerSpec

IN_PROCESS, GATEWAY = "in-process router", "gateway"
#: Seconds until workers must have been reached, events applied, caches emptied.
WAIT_S = 30.0


@dataclass
class Comparison:
    """What both ways gave, one figure a repeat.

    Attributes:
        hit_rates: by way, prompt tokens taken from a cache / prompt tokens, in [0, 1].
        requests_per_s: by way, over the time from the first request to the last answer.
        num_requests: sent in each repeat, each way.
    """

    num_requests: int
    hit_rates: dict[str, list[float]] = field(default_factory=lambda: {IN_PROCESS: [], GATEWAY: []})
    requests_per_s: dict[str, list[float]] = field(default_factory=lambda: {IN_PROCESS: [], GATEWAY: []})

    @property
    def difference(self) -> float:
        """The gateway's mean hit rate less the in-process router's."""
        return mean(self.hit_rates[GATEWAY]) - mean(self.hit_rates[IN_PROCESS])

    @property
    def standard_error(self) -> float | None:
        """Of `difference`, both ways taken as independent; None with fewer than two repeats."""
        rates = list(self.hit_rates.values())
        if len(rates[0]) < 2:
            return None
        return math.sqrt(sum(stdev(way) ** 2 / len(way) for way in rates))


def compare(
    settings: BenchSettings, repeats: int, on_turn: Callable[[str, float], None] = lambda *_: None
) -> Comparison:
    """Start workers, send the workload of ``settings`` both ways ``repeats`` times, and stop all.

    on_turn: called after each turn with its way and hit rate.

    Raises:
        ValueError: settings that do not fit together.
        RuntimeError: workers did not start, or a request failed.
    """
    settings.validate()
    (workload,) = make_workloads(settings)
    requests = workload.requests()
    with ExitStack() as stack:
        fleet = start_shallow_workers(settings, stack)
        ways = stack.enter_context(_Ways(settings, fleet))
        ways.wait_for_workers()
        ways.warm_up(requests[: 2 * settings.num_workers])
        result = Comparison(len(requests))
        for repeat in range(repeats):
            for way in result.hit_rates if repeat % 2 == 0 else reversed(result.hit_rates):
                ways.empty_caches()
                before = [counters.scrape(worker.url) for worker in fleet.workers]
                begin = time.perf_counter()
                ways.send(way, requests)
                result.requests_per_s[way].append(len(requests) / (time.perf_counter() - begin))
                rate = counters.hit_rate(before, [counters.scrape(worker.url) for worker in fleet.workers])
                if rate is None:
                    raise RuntimeError("the workers counted no prompt tokens")
                result.hit_rates[way].append(rate)
                on_turn(way, rate)
        return result


class _Ways:
    """A router in this process and a gateway, before the same workers."""

    def __init__(self, settings: BenchSettings, fleet: WorkerFleet) -> None:
        self._settings = settings
        self._fleet = fleet
        self._stack = ExitStack()

    def __enter__(self) -> _Ways:
        settings, fleet = self._settings, self._fleet
        with ExitStack() as stack:
            self._router = stack.enter_context(
                KvRouter(
                    settings.block_size,
                    settings.num_workers,
                    fleet.base_kv_events_port,
                    fleet.base_metrics_port,
                    policy=settings.policy,
                    seed=settings.seed,
                )
            )
            workers = [WorkerSpec(w.url, w.kv_events_endpoint, "", w.load_endpoint) for w in fleet.workers]
            options = ServeOptions(
                workers, port=0, block_size=settings.block_size, policy=settings.policy, seed=settings.seed
            )
            self._service = stack.enter_context(KvService(options))
            self._admin = RouterAdmin(self._service.url)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def wait_for_workers(self) -> None:
        """Until both see every worker, and the gateway knows what it serves."""
        deadline = time.monotonic() + WAIT_S
        self._router.wait_until_connected(WAIT_S)
        while not all(w["state"] == "up" and w["healthy"] and w["models"] for w in self._admin.workers()["workers"]):
            if time.monotonic() > deadline:
                raise RuntimeError(f"the gateway does not see every worker: {self._admin.workers()['workers']}")
            time.sleep(0.05)

    def warm_up(self, requests: Sequence[BenchRequest]) -> None:
        """A request or two to every worker: its first takes several times as long as the next."""

        async def send(client: BenchClient) -> None:
            for number, request in enumerate(requests):
                await client.send_to(number % len(self._fleet.workers), request)

        self._run([worker.url for worker in self._fleet.workers], send)

    def empty_caches(self) -> None:
        """Both routers forget, too; events that are under way come first, or they would be believed after that."""
        self._settle()
        self._fleet.reset_prefix_caches(WAIT_S)
        self._settle()
        self._router.reset()
        self._admin.reset()

    def send(self, way: str, requests: Sequence[BenchRequest]) -> None:
        """All requests in their order, by as many users as the settings say."""
        urls = [self._service.url] if way == GATEWAY else [worker.url for worker in self._fleet.workers]
        queue = iter(requests)

        async def through_gateway(client: BenchClient, request: BenchRequest) -> None:
            await client.send_to(0, request)

        async def by_router(client: BenchClient, request: BenchRequest) -> None:
            decision = self._router.route(request.tokens)
            await client.send_to(decision.worker, request)
            self._router.complete(decision.ticket, request.max_tokens)

        one = through_gateway if way == GATEWAY else by_router

        async def send(client: BenchClient) -> None:
            async def user() -> None:
                for request in queue:
                    await one(client, request)

            await asyncio.gather(*(user() for _ in range(self._settings.concurrency)))

        self._run(urls, send)

    def _run(self, urls: Sequence[str], send: Callable[[BenchClient], Awaitable[None]]) -> None:
        async def main() -> None:
            client = BenchClient("", urls, block_size=self._settings.block_size, model=self._fleet.model)
            async with client:
                await send(client)

        asyncio.run(main())

    def _settle(self) -> None:
        """Until neither has applied an event for a moment."""

        def events() -> object:
            return [worker["events"] for worker in self._router.status()["workers"]], self._admin.events()

        if not settled(events, quiet_s=0.2, timeout_s=WAIT_S):
            raise RuntimeError(f"the workers' events do not end within {WAIT_S:g} s")


def main() -> None:
    """Compare, and print both."""
    parser = argparse.ArgumentParser(prog="python -m kvrouter.bench.gateway", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--engine", choices=[name.value for name in EngineName], default="vllm", help="real vLLM, or the simulated one")
    add("--time-scale", type=float, default=1.0, help="the simulated worker's times are multiplied by this")
    add("--num-prefixes", type=int, help="default: as many as fill 6/7 of both caches")
    add("--num-requests", type=int, help="default: six for each prefix")
    add("--concurrency", type=int, default=4, help="users; each sends its next request when it has its answer")
    add("--repeats", type=int, default=3, help="the order of the ways alternates")
    add("--policy", default="linear", help="of both routers")
    args = parser.parse_args()
    settings = BenchSettings(
        engine=EngineName(args.engine),
        workload=WorkloadName.THRASH,
        time_scale=args.time_scale,
        num_prefixes=args.num_prefixes,
        num_requests=args.num_requests,
        concurrency=args.concurrency,
        policy=args.policy,
    )
    result = compare(settings, args.repeats, lambda way, rate: print(f"{way:18} {100 * rate:.1f}%", flush=True))
    print(
        f"{result.num_requests} requests, {args.repeats} repeats, {args.concurrency} users, two {args.engine} workers"
    )
    for way, rates in result.hit_rates.items():
        print(
            f"{way:18} hit rate: mean {100 * mean(rates):.1f}%, median {100 * median(rates):.1f} "
            f"({100 * min(rates):.1f} to {100 * max(rates):.1f}), "
            f"{median(result.requests_per_s[way]):.1f} requests/s"
        )
    error = result.standard_error
    spread = "" if error is None else f" (standard error {100 * error:.2f})"
    print(f"difference: {100 * result.difference:+.2f} points{spread}")


if __name__ == "__main__":
    main()
