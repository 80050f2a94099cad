"""Mixed traffic for a long time, watching for leaks: ``python tests/soak/run.py --seconds 3600`` (``make soak``).

``kvrouter serve`` in a process of its own, in front of simulated workers, and a second process that uses the router as
a library.  Memory and open descriptors of the two are sampled each second.  The last line is JSON; the exit status is 1
where either grew, or one of them failed.  Times are reported, not judged.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from leaks import Watched, growth, verdict
from traffic import BLOCK_SIZE, LOAD_PORT_OFFSET, Tally, Traffic, ask, break_off, change_workers, converse, operate

from kvrouter.sim import SimWorker

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
STABLE_WORKERS = 3
# What an allocator and idle connections may move without a leak.
MAX_MEMORY_MIB = 8.0
MAX_DESCRIPTORS = 8


def sim_worker(kv_events_port: int | None = None) -> SimWorker:
    """A worker with a small cache, so that blocks are removed as they are stored."""
    kv, load = ("*", "*") if kv_events_port is None else (kv_events_port, kv_events_port + LOAD_PORT_OFFSET)
    return SimWorker(
        block_size=BLOCK_SIZE,
        num_blocks=1200,
        max_model_len=1024,
        time_scale=0.1,
        kv_events_endpoint=f"tcp://127.0.0.1:{kv}",
        load_endpoint=f"tcp://127.0.0.1:{load}",
    )


def stable_worker() -> tuple[int, SimWorker]:
    """A worker whose ports lie as the library's settings need it, and its KV-event port."""
    for _ in range(100):
        port = random.randrange(20_000, 32_000)
        with contextlib.suppress(RuntimeError):  # a port is taken
            return port, sim_worker(port)
    raise RuntimeError("no free ports found")


@contextlib.contextmanager
def process(command: list[str], log: Path, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A child that does not outlive the block."""
    with open(log, "w", encoding="utf-8") as stderr:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, **options)
        try:
            yield child
        finally:
            child.send_signal(signal.SIGTERM)
            try:
                child.wait(20)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def percentiles(latencies: list[tuple[float, float]]) -> dict[str, float]:
    """In milliseconds."""
    times = sorted(duration * 1e3 for _, duration in latencies)
    if not times:
        return {"p50": 0.0, "p99": 0.0}
    return {"p50": round(times[len(times) // 2], 2), "p99": round(times[len(times) * 99 // 100], 2)}


def watch(watched: list[Watched], traffic: Traffic, seconds: float) -> None:
    """Samples each second.  Raises RuntimeError when a process or a part of the traffic ends."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        time.sleep(1)
        for one in watched:
            one.look()
        if traffic.errors:
            raise RuntimeError(traffic.errors[0])
        if len(watched[0].samples) % 30 == 0:
            shown = ", ".join(
                f"{one.name} {one.samples[-1].memory_mib:.1f} MiB, {one.samples[-1].descriptors} descriptors"
                for one in watched
            )
            print(f"{watched[0].samples[-1].seconds:7.0f} s: {shown}", flush=True)


def soak(seconds: float, out: Path) -> dict[str, Any]:
    """Runs it; returns what the last line says."""
    out.mkdir(parents=True, exist_ok=True)
    tally, traffic = Tally(), Traffic()
    with contextlib.ExitStack() as stack:
        ports, workers = zip(*(stable_worker() for _ in range(STABLE_WORKERS)), strict=True)
        for worker in workers:
            stack.enter_context(worker)
        options = [
            f"--worker=http://127.0.0.1:{worker.port},kv_events={worker.kv_events_endpoint},load={worker.load_endpoint}"
            for worker in workers
        ]
        serve = stack.enter_context(
            process(
                [sys.executable, "-m", "kvrouter.cli", "serve", "--port=0", f"--block-size={BLOCK_SIZE}", *options],
                out / "serve.log",
            )
        )
        assert serve.stdout is not None
        said = re.search(r"http://127\.0\.0\.1:(\d+)", serve.stdout.readline())
        if not said:
            raise RuntimeError(f"kvrouter serve did not start: see {out / 'serve.log'}")
        port = int(said[1])
        # Its lines go to a file: a pipe that nobody reads would stop it.
        with open(out / "library.jsonl", "w", encoding="utf-8") as lines:
            library = subprocess.Popen(
                [sys.executable, str(HERE / "library_router.py"), str(BLOCK_SIZE), *map(str, ports)],
                stdin=subprocess.PIPE,
                stdout=lines,
                stderr=subprocess.STDOUT,
            )
        stack.callback(end_of_input, library)
        while json.loads(ask(port, "GET", "/health")[1])["status"] != "ok" or ask(port, "GET", "/ready")[0] != 200:
            time.sleep(0.1)

        watched = [Watched("serve", serve.pid), Watched("library", library.pid)]
        stack.callback(traffic.end)
        for seed in range(6):
            traffic.start(converse(port, tally, seed))
        for seed in range(2):
            traffic.start(break_off(port, tally, seed))
        traffic.start(operate(port, tally, workers))
        traffic.start(change_workers(port, tally, sim_worker))
        watch(watched, traffic, seconds)
        traffic.end()
        status = json.loads(ask(port, "GET", "/workers")[1])
        status["descriptor_kinds"] = watched[0].kinds()
    return result(seconds, out, tally, watched, status)


def end_of_input(child: subprocess.Popen[bytes]) -> None:
    """Lets the library's process come to its end."""
    assert child.stdin is not None
    child.stdin.close()
    try:
        child.wait(30)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def result(seconds: float, out: Path, tally: Tally, watched: list[Watched], status: dict[str, Any]) -> dict[str, Any]:
    """What came of it."""
    warm_up = min(max(20.0, seconds / 4), 300.0)
    began = watched[0].started
    late = [entry for entry in tally.latencies if entry[0] - began >= warm_up]
    third = len(late) // 3
    decided = [json.loads(line) for line in (out / "library.jsonl").read_text().splitlines()]
    grown = {one.name: growth(one.samples, warm_up) for one in watched}
    leaks = [found for name, one in grown.items() for found in verdict(name, one, MAX_MEMORY_MIB, MAX_DESCRIPTORS)]
    (out / "samples.json").write_text(
        json.dumps({one.name: [asdict(sample) for sample in one.samples] for one in watched})
    )
    return {
        "seconds": seconds,
        "requests": tally.counts["answered"] + tally.counts["streamed"],
        **dict(sorted(tally.counts.items())),
        "library_decisions": sum(line["decisions"] for line in decided),
        "library_routers": len(decided),
        "library_decision_us": {
            "first": round(decided[0]["p50_us"], 1) if decided else 0.0,
            "last": round(decided[-1]["p50_us"], 1) if decided else 0.0,
        },
        "latency_ms": {"first_third": percentiles(late[:third]), "last_third": percentiles(late[-third:])},
        "index_blocks": status["index"]["blocks"],
        "descriptor_kinds": status["descriptor_kinds"],
        **{name: asdict(one) for name, one in grown.items()},
        "leaks": leaks,
    }


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3600, help="of traffic; 60 or more")
    parser.add_argument("--output", type=Path, default=ROOT / "out" / "soak")
    args = parser.parse_args()
    if args.seconds < 60:
        parser.error("--seconds must be at least 60: less says nothing of memory")
    os.environ["PYTHONUNBUFFERED"] = "1"
    outcome = soak(args.seconds, args.output)
    for leak in outcome["leaks"]:
        print(f"LEAK: {leak}", file=sys.stderr)
    if not all(outcome.get(kind) for kind in ("answered", "streamed", "broken_clients", "refits", "worker_changes")):
        print("some of the traffic never came about", file=sys.stderr)
        outcome["leaks"].append("not tested")
    print(json.dumps(outcome))
    return 1 if outcome["leaks"] else 0


if __name__ == "__main__":
    sys.exit(main())
