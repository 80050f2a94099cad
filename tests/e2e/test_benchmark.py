"""The benchmark as a user runs it, on simulated workers: whole runs, and runs in which something dies."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvrouter.bench.client import BenchClient
from kvrouter.bench.router_process import RouterProcess
from kvrouter.bench.workloads import Thrash
from kvrouter.vllm import launch_workers
from process_state import runs

EXAMPLE = Path(__file__).parents[2] / "examples" / "run_router_benchmark.py"
COMMAND = [sys.executable, str(EXAMPLE), "--engine", "sim", "--router-port", "0"]
FIGURES = {
    "hit_rate",
    "requests_per_s",
    "tokens_per_s",
    "ttft_ms",
    "latency_ms",
    "router_us",
    "requests_per_worker",
}


def run_example(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "160"}
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=300, check=False, env=environment
    )


def check_shape(result: dict, num_requests: int) -> None:
    assert {"workload", "engine", "modes", "settings", "environment"} <= set(result)
    assert result["engine"] == "sim"
    assert set(result["modes"]) == {"round_robin", "kv_aware"}
    for figures in result["modes"].values():
        assert set(figures) >= FIGURES
        assert 0 <= figures["hit_rate"] <= 1
        assert figures["requests_per_s"] > 0 and figures["tokens_per_s"] > figures["requests_per_s"]
        for key in ("ttft_ms", "latency_ms"):
            assert 0 < figures[key]["p50"] <= figures[key]["p95"] <= figures[key]["p99"]
        assert 0 < figures["router_us"]["p50"] <= figures["router_us"]["p99"]
        assert sum(figures["requests_per_worker"]) == num_requests
        assert figures["failed"] == figures["retried"] == figures["without_router"] == 0
    assert result["modes"]["round_robin"]["requests_per_worker"] == [num_requests // 2] * 2


def descendants(pid: int) -> set[int]:
    """Processes below `pid`, itself left out."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found: set[int] = set()
    unvisited = [pid]
    while unvisited:
        below = children.get(unvisited.pop(), [])
        found.update(below)
        unvisited += below
    return found


def wait_until(condition, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "in vain"
        time.sleep(0.05)


def test_thrash_is_where_knowing_the_caches_pays(tmp_path):
    done = run_example("--workload", "thrash", "--check-prediction", "--time-scale", "0.1", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "results.json").read_text())
    check_shape(result, num_requests=result["modes"]["kv_aware"]["requests"])
    modes = result["modes"]
    assert modes["kv_aware"]["hit_rate"] >= modes["round_robin"]["hit_rate"] + 0.3
    assert modes["kv_aware"]["requests_per_s"] > modes["round_robin"]["requests_per_s"]
    assert result["prediction_check"]["agreement"] >= 0.99
    assert result["prediction_check"]["with_overlap"] > 0
    assert "hit rate [%]" in done.stdout and "KV-aware against round robin" in done.stdout
    for name in ("hit_rate", "throughput", "ttft", "router_latency", "requests_per_worker"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
    assert len((tmp_path / "requests.jsonl").read_text().splitlines()) == 2 * modes["kv_aware"]["requests"]


def test_all_workloads_with_repeats_give_a_list(tmp_path):
    done = run_example(
        *("--workload", "all", "--num-requests", "32", "--repeats", "2", "--time-scale", "0.02"),
        *("--output", str(tmp_path)),
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert [result["workload"] for result in results] == ["shared", "thrash", "group", "unique"]
    for result in results:
        check_shape(result, num_requests=32)
        for figures in result["modes"].values():
            least, greatest = figures["spread"]["requests_per_s"]
            assert least <= figures["requests_per_s"] <= greatest
    by_name = {result["workload"]: result["modes"] for result in results}
    assert by_name["unique"]["kv_aware"]["hit_rate"] == by_name["unique"]["round_robin"]["hit_rate"] == 0
    assert by_name["shared"]["round_robin"]["hit_rate"] > 0.5


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_run_leaves_nothing_behind(number, status):
    process = subprocess.Popen(
        [*COMMAND, "--workload", "unique", "--num-requests", "100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        # Two workers and the router, each below a guard.
        wait_until(lambda: len(descendants(process.pid)) >= 6 or process.poll() is not None)
        time.sleep(1.0)
        assert process.poll() is None, process.communicate()[0].decode()
        started = descendants(process.pid)
        process.send_signal(number)
        output = process.communicate(timeout=30)[0].decode()
    finally:
        process.kill()
    assert process.returncode == status, output
    assert "Traceback" not in output
    wait_until(lambda: not any(map(runs, started)), timeout_s=5.0)


def test_taken_router_port_is_named():
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [*COMMAND, "--router-port", port], capture_output=True, text=True, timeout=60, check=False
        )
    assert done.returncode == 2
    assert port in done.stderr and "--router-port" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("victim", ["worker", "router"])
def test_something_killed_in_mid_run_is_one_warning_and_every_request_is_answered(victim, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("kvrouter"), "propagate", True)
    requests = Thrash(120, 640, 8, num_prefixes=8, prefix_len=576).requests()
    with (
        launch_workers(2, engine="sim", num_gpu_blocks=128, max_model_len=1024, progress=False) as fleet,
        RouterProcess(
            host="127.0.0.1",
            port=0,
            block_size=64,
            kv_events_ports=[worker.kv_events_port for worker in fleet.workers],
            metrics_ports=[worker.metrics_port for worker in fleet.workers],
            worker_urls=[worker.url for worker in fleet.workers],
            policy="linear",
            seed=1,
        ) as router,
    ):
        client = BenchClient(router.url, [w.url for w in fleet.workers], block_size=64, model=fleet.model)
        done = 0

        def kill_in_the_middle(_: object) -> None:
            nonlocal done
            done += 1
            if done == 40:
                fleet.kill(0) if victim == "worker" else router.kill()

        async def drive() -> list:
            async with client:
                return await client.run(requests, "kv_aware", concurrency=4, on_done=kill_in_the_middle)

        records = asyncio.run(drive())
    assert len(records) == 120
    assert [record.error for record in records if record.error is not None] == []
    warnings = [entry.getMessage() for entry in caplog.records if entry.levelno >= logging.WARNING]
    assert len(warnings) == 1, warnings
    late = {record.worker for record in records[60:]}
    if victim == "worker":
        assert "worker 0" in warnings[0] and late == {1}
        assert any(record.attempts == 2 for record in records)
    else:
        assert "round robin" in warnings[0] and late == {0, 1}
        assert all(record.router_us is None for record in records[60:])


def test_run_outlives_a_killed_worker(tmp_path):
    """The whole example: the other mode, the resets and the counters cope too, with one warning in all."""
    process = subprocess.Popen(
        [*COMMAND, "--workload", "group", "--num-requests", "160", "--output", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "COLUMNS": "200"},
    )
    try:
        # The router's log is opened once the workers are healthy; requests flow a moment later.
        wait_until((tmp_path / "logs" / "router.log").exists)
        time.sleep(2.0)
        worker = next(pid for pid in descendants(process.pid) if is_sim_worker(pid))
        os.kill(worker, signal.SIGKILL)
        stdout, stderr = (text.decode() for text in process.communicate(timeout=240))
    finally:
        process.kill()
    assert process.returncode == 0, stderr
    assert stderr.count("WARNING") == 1, stderr
    assert "its requests go to other workers" in " ".join(stderr.split()), "wrapped as the terminal is wide"
    result = json.loads((tmp_path / "results.json").read_text())
    assert [figures["failed"] for figures in result["modes"].values()] == [0, 0]
    assert "lost worker" in stdout


def is_sim_worker(pid: int) -> bool:
    """Whether `pid` is a worker itself, not the guard above it."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return b"kvrouter" in command and b"--kv-events-endpoint" in command and b"guard.py" not in command
