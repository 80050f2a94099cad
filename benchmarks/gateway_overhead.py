"""What the gateway adds: the same requests to a worker directly and through it, by turns, in one run.

    python benchmarks/gateway_overhead.py [--requests 400] [--streams 1000]

One simulated worker that answers at once, one client connection each way, prompts of 2,048 token ids, streamed; the
time to the first byte of the first event.  Then 1,000 streams at once through the gateway, and its memory meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import statistics
import subprocess
import sys
import time
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


def compare(worker: str, gateway: str, requests: int) -> None:
    """Prints the times to the first byte, both ways."""
    body = {"model": "sim", "prompt": [i % 1000 for i in range(2048)], "max_tokens": 2, "stream": True}
    data = json.dumps(body).encode()
    ways = {"direct": connect(worker), "gateway": connect(gateway)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(requests + 20):
        for name, connection in ways.items():
            taken = first_byte_s(connection, data)
            if i >= 20:
                times[name].append(taken * 1e3)
    for name, taken_ms in times.items():
        cuts = statistics.quantiles(taken_ms, n=100)
        print(f"{name:8} time to first byte: p50 {cuts[49]:.3f} ms, p90 {cuts[89]:.3f} ms, p99 {cuts[98]:.3f} ms")
    print(f"added at p50: {statistics.median(times['gateway']) - statistics.median(times['direct']):.3f} ms")


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
        before, most = resident_mib(pid), 0.0
        begin = time.perf_counter()
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            tasks = [asyncio.create_task(one(session)) for _ in range(streams)]
            while not all(task.done() for task in tasks):
                await asyncio.sleep(0.1)
                most = max(most, resident_mib(pid))
            whole = sum(task.result() == 65 for task in tasks)
        print(
            f"round {number}: {whole} of {streams} streams whole in {time.perf_counter() - begin:.1f} s; "
            f"memory {before:.1f} MiB before, {most:.1f} at most, {resident_mib(pid):.1f} after"
        )


def main() -> None:
    """Starts a worker and a gateway, and compares."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    sim = ["kvrouter.sim", "--port", "0", "--time-scale", "0", "--max-num-seqs", "2000"]
    worker, worker_url = start([*sim, "--num-blocks", "8192"], "http://")
    gateway, url = start(
        ["kvrouter.cli", "serve", "--port", "0", "--worker", worker_url, "--max-concurrency", "2000"], "http://"
    )
    try:
        while connect_status(url) != 200:
            time.sleep(0.1)
        compare(worker_url, url, args.requests)
        asyncio.run(many_streams(url, gateway.pid, args.streams, args.rounds))
    finally:
        for process in (gateway, worker):
            process.terminate()
            process.wait()


def connect_status(url: str) -> int:
    """Status of the service's /ready."""
    connection = connect(url)
    connection.request("GET", "/ready")
    return connection.getresponse().status


if __name__ == "__main__":
    main()
