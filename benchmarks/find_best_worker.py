"""Requests a second of ``/find_best_worker``: kvrouter's server beside the same handler in FastAPI over Dynamo's index.

    python benchmarks/find_best_worker.py [--seconds 5] [--connections 16]

Both on one core (the first), the client on the others; 32 hashes (2,048 tokens in blocks of 64), two workers, a prefix
that one of them holds.  The client is the same for both: it sends ready bytes over kept connections and counts answers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path

HASHES = [(i + 1) * 0x9E3779B97F4A7C15 % 2**64 for i in range(32)]

FASTAPI_SERVER = """
import json, sys, uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from dynamo.llm import RadixTree

class Query(BaseModel):
    local_hashes: list[int]
    num_tokens: int

tree = RadixTree()
blocks = [{"block_hash": value, "tokens_hash": value} for value in HASHES]
event = {"event_id": 0, "data": {"stored": {"parent_hash": None, "blocks": blocks}}, "dp_rank": 0}
tree.apply_event(1, json.dumps(event).encode())
app = FastAPI()
loads = {0: (0.0, 0), 1: (0.0, 0)}

@app.post("/find_best_worker")
async def find_best_worker(query: Query) -> dict[str, int]:
    scores = tree.find_matches(query.local_hashes).scores
    held = {key[0] if isinstance(key, tuple) else key: blocks for key, blocks in scores.items()}
    most = max(waiting for _, waiting in loads.values()) or 1
    def logit(worker: int) -> float:
        usage, waiting = loads[worker]
        return 2 * held.get(worker, 0) * 64 / query.num_tokens - usage - waiting / most
    best = max(loads, key=logit)
    return {"worker_id": best, "overlap_blocks": held.get(best, 0)}

uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="error")
"""


OWN_SERVER = """
import signal, sys
from kvrouter.api import RouterAPI

api = RouterAPI(num_workers=2, port=int(sys.argv[1]), base_kv_events_port=1, base_metrics_port=101)
api.serve()
api.router._core.index.store(1, None, HASHES, HASHES)
signal.pause()
"""


async def count_answers(port: int, seconds: float, connections: int) -> float:
    """Answers a second."""
    body = json.dumps({"local_hashes": HASHES, "num_tokens": 2048}).encode()
    request = (
        b"POST /find_best_worker HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
        + str(len(body)).encode()
        + b"\r\n\r\n"
        + body
    )
    answers = 0
    end = time.monotonic() + seconds

    async def one() -> None:
        nonlocal answers
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while time.monotonic() < end:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            answer = await reader.readexactly(length)
            assert b"32" in answer, answer  # blocks held by the worker that was chosen
            answers += 1
        writer.close()

    begin = time.monotonic()
    await asyncio.gather(*(one() for _ in range(connections)))
    return answers / (time.monotonic() - begin)


def server_cpu_s(pid: int) -> float:
    """CPU seconds of a process."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text(encoding="ascii").split()[0]) for task in tasks) / 1e9


def measure(name: str, command: list[str], port: int, seconds: float, connections: int) -> tuple[float, float]:
    """Answers a wall-clock second, and a second of the server's CPU."""
    cpus = sorted(os.sched_getaffinity(0))
    server = subprocess.Popen(["taskset", "-c", str(cpus[0]), sys.executable, *command])
    os.sched_setaffinity(0, cpus[1:] or cpus)
    try:
        for _ in range(600):
            try:
                asyncio.run(count_answers(port, 0.2, 1))
                break
            except OSError:
                time.sleep(0.1)
        before = server_cpu_s(server.pid)
        rate = asyncio.run(count_answers(port, seconds, connections))
        used = server_cpu_s(server.pid) - before
    finally:
        server.terminate()
        server.wait()
        os.sched_setaffinity(0, cpus)
    per_cpu = rate * seconds / used
    print(f"{name:24} {rate:10,.0f} requests/s   {per_cpu:10,.0f} a second of its CPU")
    return rate, per_cpu


def main() -> None:
    """Measures both, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--port", type=int, default=17071)
    args = parser.parse_args()
    ports = (args.port, args.port + 1)
    peer = measure(
        "FastAPI over Dynamo",
        ["-c", f"HASHES = {HASHES}" + FASTAPI_SERVER, str(ports[0])],
        ports[0],
        args.seconds,
        args.connections,
    )
    command = ["-c", f"HASHES = {HASHES}" + OWN_SERVER, str(ports[1])]
    own = measure("kvrouter", command, ports[1], args.seconds, args.connections)
    print(f"ratio: {own[0] / peer[0]:.1f}x requests/s, {own[1] / peer[1]:.1f}x a second of CPU")


if __name__ == "__main__":
    main()
