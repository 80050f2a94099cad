"""What the tests of rollouts on Ray share."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from kvrouter.vllm.ports import find_free_ports

BLOCK_SIZE = 64


def router_cfg(**changes: Any) -> dict[str, Any]:
    """A router on ports that nobody has: others may run fleets on this machine."""
    ports = find_free_ports(64)
    base = ports.base
    ports.release()
    return {
        "enabled": True,
        "block_size": BLOCK_SIZE,
        "base_kv_events_port": base,
        "base_metrics_port": base + 32,
        **changes,
    }


def sim_config(**changes: Any) -> dict[str, Any]:
    """Simulated engines, ten times as fast as they are by default."""
    return {
        "engine": "sim",
        "model_name": "sim",
        "max_new_tokens": 8,
        "router_cfg": router_cfg(),
        "sim_cfg": {"time_scale": 0.1},
        **changes,
    }


def prompts(count: int, length: int = 260, width: int = 300, seed: int = 0, padding: int = 0) -> dict[str, Any]:
    """``count`` prompts that share nothing, right-padded to ``width``."""
    ids = np.random.default_rng(seed).integers(3, 1000, (count, width))
    ids[:, 0] = 3 + np.arange(count) + 100 * (seed % 9)
    ids[:, length:] = padding
    return {"input_ids": ids, "input_lengths": np.full(count, length)}


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 120.0) -> None:
    """Returns when ``condition`` holds; fails when it does not within ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s for {what}"
        time.sleep(0.05)


def hits(length: int) -> int:
    """Tokens of a cached prompt that an engine takes from its cache: whole blocks, and never the last token."""
    return (length - 1) // BLOCK_SIZE * BLOCK_SIZE


def cluster(workers: int = 2) -> Any:
    """Room for so many workers, of the little that simulated ones take."""
    from kvrouter.ray import RayVirtualCluster

    return RayVirtualCluster([workers], use_gpus=False, num_cpus_per_bundle=0.1)


def settle(generation: Any, blocks: int) -> None:
    """Waits until the router knows of so many cached blocks."""
    wait_until(lambda: sum(cached_blocks(generation)) >= blocks, f"{blocks} blocks in the router's index")


def cached_blocks(generation: Any) -> list[int]:
    """What each worker holds, as the router knows it."""
    return [worker["cached_blocks"] for worker in generation.router.status()["workers"]]
