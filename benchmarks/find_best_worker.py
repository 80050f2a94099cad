"""Requests a second of ``/find_best_worker``: kvrouter's server beside the same handler in FastAPI over Dynamo's index.

    python benchmarks/find_best_worker.py [--rounds 5] [--seconds 3] [--connections 64]

32 hashes (2,048 tokens in blocks of 64), two workers, a prefix that one of them holds.  Each server has the first core
to itself, and the load generator, wrk (``apt-get install wrk``), the second: a client in Python is slower than either
server and would measure itself.  The servers take turns; figures are medians of the rounds, with the least and the
greatest.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

HASHES = [(i + 1) * 0x9E3779B97F4A7C15 % 2**64 for i in range(32)]
BODY = json.dumps({"local_hashes": HASHES, "num_tokens": 2048})
ANSWER = {"worker_id": 1, "overlap_blocks": 32}

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

uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="error", access_log=False)
"""


OWN_SERVER = """
import logging, signal, sys
from kvrouter.api import RouterAPI

logging.disable(logging.WARNING)  # there are no workers to be reached
api = RouterAPI(num_workers=2, port=int(sys.argv[1]), base_kv_events_port=1, base_metrics_port=101)
api.serve()
api.router._core.index.store(1, None, HASHES, HASHES)
signal.pause()
"""

#: wrk makes the request once and sends the same bytes again and again.
WRK_SCRIPT = """
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.body = [[%s]]
"""


def ask(port: int) -> object:
    """The server's answer to the request that is measured."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("POST", "/find_best_worker", BODY, {"Content-Type": "application/json"})
    return json.loads(connection.getresponse().read())


@contextlib.contextmanager
def served(program: str, port: int, core: int) -> Iterator[int]:
    """The process id of a server that answers rightly, on one core."""
    command = ["taskset", "-c", str(core), sys.executable, "-c", f"HASHES = {HASHES}\n{program}", str(port)]
    server = subprocess.Popen(command)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                if (answer := ask(port)) == ANSWER:
                    break
                raise SystemExit(f"a wrong answer: {answer}")
            time.sleep(0.1)
        yield server.pid
    finally:
        server.terminate()
        server.wait()


def server_cpu_s(pid: int) -> float:
    """CPU seconds of a process."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text(encoding="ascii").split()[0]) for task in tasks) / 1e9


def load(port: int, core: int, script: str, seconds: float, connections: int) -> float:
    """Answers a second that wrk counts; all have to be 200."""
    command = ["taskset", "-c", str(core), "wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "-s", script]
    report = subprocess.run(
        [*command, f"http://127.0.0.1:{port}/find_best_worker"], check=True, capture_output=True, text=True
    ).stdout
    if "Non-2xx" in report or "Socket errors" in report:
        raise SystemExit(report)
    found = re.search(r"Requests/sec:\s+([\d.]+)", report)
    assert found, report
    return float(found[1])


def summary(values: list[float]) -> str:
    """The median, and the least and the greatest."""
    return f"{statistics.median(values):9,.0f} ({min(values):,.0f} to {max(values):,.0f})"


def main() -> None:
    """Measures both by turns."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--port", type=int, default=17071)
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("this needs two cores: one for the server, one for the client")
    if not shutil.which("wrk"):
        raise SystemExit("wrk is not installed: apt-get install wrk")
    servers = {"FastAPI over Dynamo": (FASTAPI_SERVER, args.port), "kvrouter": (OWN_SERVER, args.port + 1)}
    with contextlib.ExitStack() as stack:
        script = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "request.lua"
        script.write_text(WRK_SCRIPT % BODY, encoding="ascii")
        pids = {name: stack.enter_context(served(*program, cores[0])) for name, program in servers.items()}
        rates: dict[str, list[float]] = {name: [] for name in servers}
        per_cpu: dict[str, list[float]] = {name: [] for name in servers}
        for number in range(args.rounds + 1):
            for name, (_, port) in servers.items():
                used, begin = server_cpu_s(pids[name]), time.monotonic()
                rate = load(port, cores[1], str(script), args.seconds if number else 1, args.connections)
                taken = time.monotonic() - begin
                used = server_cpu_s(pids[name]) - used
                if number:  # the first round is to warm up
                    rates[name].append(rate)
                    per_cpu[name].append(rate * taken / used)
    print(f"{args.connections} connections, {args.rounds} rounds of {args.seconds:g} s")
    for name in servers:
        print(f"{name:20} {summary(rates[name])} requests/s  {summary(per_cpu[name])} a second of its CPU")
    ratios = [own / peer for own, peer in zip(rates["kvrouter"], rates["FastAPI over Dynamo"], strict=True)]
    print(f"ratio: {statistics.median(ratios):.1f}x ({min(ratios):.1f}x to {max(ratios):.1f}x)")


if __name__ == "__main__":
    main()
