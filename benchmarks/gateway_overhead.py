"""What the gateway adds: the same requests to a worker directly and through it, by turns, in one run.

    python benchmarks/gateway_overhead.py [--repeats 5] [--requests 1000] [--streams 1000] [--rounds 6]

One simulated worker that answers at once, one client connection each way, prompts of 2,048 token ids, streamed; the
time to the first byte of the first event, several repeats with their medians, and their spread.  Then 1,000 streams at
once through the gateway to a worker that takes its time for each token, round after round: how many were under way at
once, as the gateway counts them, and its memory meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp


def start(command: list[str], marker: str) -> tuple[subprocess.Popen[str], str]:
    """A process, and the word of its output that begins with ``marker``."""
    process = subprocess.Popen([sys.executable, "-m", *command], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        for word in line.split():
            if word.startswith(marker):
                return process, word
    raise SystemExit(f"{command} did not start")


def first_byte_s(connection: http.client.HTTPConnection, body: bytes) -> float:
    """Seconds from the request to the first byte of the answer's body."""
    begin = time.perf_counter()
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 200, answer.status
    answer.read(1)
    taken = time.perf_counter() - begin
    answer.read()
    return taken


def connect(url: str) -> http.client.HTTPConnection:
    """A connection that is kept."""
    host, port = url.removeprefix("http://").split(":")
    return http.client.HTTPConnection(host, int(port), timeout=60)


def compare(worker: str, gateway: str, requests: int, repeats: int) -> None:
    """Prints the times to the first byte both ways, of all repeats, and what the gateway added in each."""
    body = {"model": "sim", "prompt": [i % 1000 for i in range(2048)], "max_tokens": 2, "stream": True}
    data = json.dumps(body).encode()
    ways = {"direct": connect(worker), "gateway": connect(gateway)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    added = []
    for repeat in range(repeats + 1):
        now: dict[str, list[float]] = {name: [] for name in ways}
        for i in range(requests if repeat else 50):
            # Who comes second finds the worker's memory warm: they take turns at it.
            for name in ways if i % 2 else reversed(ways):
                now[name].append(first_byte_s(ways[name], data) * 1e3)
        if repeat:  # the first is to warm up
            added.append(statistics.median(now["gateway"]) - statistics.median(now["direct"]))
            for name in ways:
                times[name] += now[name]
    for name, taken_ms in times.items():
        cuts = statistics.quantiles(taken_ms, n=100)
        print(f"{name:8} time to first byte: p50 {cuts[49]:.3f} ms, p90 {cuts[89]:.3f} ms, p99 {cuts[98]:.3f} ms")
    print(
        f"added at p50, {repeats} repeats of {requests} requests: "
        f"{statistics.median(added):.3f} ms ({min(added):.3f} to {max(added):.3f})"
    )


def resident_mib(pid: int) -> float:
    """Resident memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


async def many_streams(gateway: str, pid: int, streams: int, rounds: int) -> None:
    """``streams`` at once, ``rounds`` times; prints the gateway's memory before, during and after each round."""
    prompt: list[int] = list(range(64))
    body: dict[str, Any] = {"model": "sim", "prompt": prompt, "max_tokens": 64, "stream": True}

    async def one(session: aiohttp.ClientSession) -> int:
        async with session.post(f"{gateway}/v1/completions", json=body) as answer:
            return (await answer.read()).count(b"data: ")

    for number in range(rounds):
        before, most_mib, most_streams = resident_mib(pid), 0.0, 0
        begin = time.perf_counter()
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            tasks = [asyncio.create_task(one(session)) for _ in range(streams)]
            while not all(task.done() for task in tasks):
                await asyncio.sleep(0.1)
                async with session.get(f"{gateway}/metrics") as answer:
                    page = await answer.text()
                under_way = re.search(r"^kvrouter_requests_in_flight (\d+)", page, re.MULTILINE)
                most_streams = max(most_streams, int(under_way[1]) if under_way else 0)
                most_mib = max(most_mib, resident_mib(pid))
            whole = sum(task.result() == 65 for task in tasks)
        print(
            f"round {number}: {whole} of {streams} streams whole in {time.perf_counter() - begin:.1f} s, "
            f"{most_streams} at once; memory {before:.1f} MiB before, {most_mib:.1f} at most, "
            f"{resident_mib(pid):.1f} after"
        )


@contextlib.contextmanager
def served(*worker_options: str) -> Iterator[tuple[str, str, int]]:
    """URLs of a simulated worker and of a gateway before it that is ready, and the gateway's process id."""
    options = ["--port", "0", "--max-num-seqs", "2000", "--num-blocks", "8192", *worker_options]
    worker, worker_url = start(["kvrouter.sim", *options], "http://")
    serve = ["kvrouter.cli", "serve", "--port", "0", "--max-concurrency", "2000", "--worker", worker_url]
    try:
        gateway, url = start(serve, "http://")
        try:
            while connect_status(url) != 200:
                time.sleep(0.1)
            yield worker_url, url, gateway.pid
        finally:
            gateway.terminate()
            gateway.wait()
    finally:
        worker.terminate()
        worker.wait()


def main() -> None:
    """Compares, and then holds many streams open."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    with served("--time-scale", "0") as (worker, gateway, _):
        compare(worker, gateway, args.requests, args.repeats)
    with served("--step-s", "0.1", "--decode-sequence-s", "0") as (_, gateway, pid):
        asyncio.run(many_streams(gateway, pid, args.streams, args.rounds))


def connect_status(url: str) -> int:
    """Status of the service's /ready."""
    connection = connect(url)
    connection.request("GET", "/ready")
    return connection.getresponse().status


if __name__ == "__main__":
    main()
