"""The Ray benchmark as its users start it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvrouter.vllm.ports import find_free_ports

pytest.importorskip("ray", reason="Ray is not installed: pip install 'kvrouter[ray]'")

ROOT = Path(__file__).parents[2]
PLOTS = {"hit_rate.png", "throughput.png", "ttft.png", "router_latency.png", "requests_per_worker.png"}


def run(folder: Path, *flags: str) -> list[dict]:
    """The benchmark in a process of its own; ``results.json``."""
    ports = find_free_ports(128)
    base = ports.base
    ports.release()
    command = [sys.executable, str(ROOT / "examples/run_router_benchmark_ray.py"), "--output", str(folder), *flags]
    command += ["--base-kv-events-port", str(base), "--base-metrics-port", str(base + 64)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=550, check=False, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "KV-aware against round robin" in done.stdout
    assert {path.name for path in folder.iterdir()} > PLOTS
    results: list[dict] = json.loads((folder / "results.json").read_text())
    for result in results:
        for figures in result["modes"].values():
            assert figures["failed"] == 0
            assert figures["wall_s"] > 0
    return results


def gain(result: dict) -> float:
    """Hit rate of KV-aware routing above round robin's, in [0, 1]."""
    return result["modes"]["kv_aware"]["hit_rate"] - result["modes"]["round_robin"]["hit_rate"]


def test_all_modes_on_simulated_engines(tmp_path):
    results = run(
        tmp_path,
        *("--engine", "sim", "--compare-modes", "--time-scale", "0.05", "--num-iterations", "2"),
        *("--batch-size", "64", "--num-generations-per-prompt", "2", "--shuffle"),
    )
    assert [result["integration"] for result in results] == ["simple", "manual", "integrated"]
    for result in results:
        kv_aware = result["modes"]["kv_aware"]
        assert gain(result) >= 0.3
        assert kv_aware["requests"] == 128
        assert sum(kv_aware["requests_per_worker"]) == 128
        assert kv_aware["requests_per_node"] == [128]
        assert kv_aware["transit_ms"]["local"]["requests"] == 128
        assert kv_aware["transit_ms"]["remote"]["requests"] == 0
        assert kv_aware["router_share_of_request"] > 0
        assert result["settings"]["num_prefixes"] == 32
    assert len((tmp_path / "requests.jsonl").read_text().splitlines()) == 3 * 2 * 128


def test_32_simulated_engines_on_four_nodes(tmp_path):
    (result,) = run(
        tmp_path,
        *("--engine", "sim", "--num-nodes", "4", "--gpus-per-node", "8", "--batch-size", "128"),
        *("--warmup-iterations", "4", "--num-iterations", "4", "--time-scale", "0.2"),
    )
    kv_aware = result["modes"]["kv_aware"]
    assert gain(result) >= 0.3
    assert len(kv_aware["tokens_per_worker"]) == 32
    assert kv_aware["imbalance"] <= 1.5
    assert len(kv_aware["requests_per_node"]) == 4
    assert all(kv_aware["requests_per_node"])
    assert kv_aware["transit_ms"]["remote"]["requests"] > kv_aware["transit_ms"]["local"]["requests"] > 0


@pytest.mark.vllm
def test_all_modes_on_vllm_engines(tmp_path):
    results = run(
        tmp_path,
        *("--compare-modes", "--seq-len", "800", "--num-blocks", "224", "--generation-max-tokens", "4"),
        *("--batch-size", "32", "--warmup-iterations", "1", "--num-iterations", "1"),
    )
    assert [result["integration"] for result in results] == ["simple", "manual", "integrated"]
    for result in results:
        assert gain(result) >= 0.3
        assert result["engine"] == "vllm"
