"""Placement, ports, and workers that die."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading

import numpy as np
import pytest
from ray_support import cached_blocks, cluster, prompts, settle, sim_config, wait_until

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'kvrouter[ray]'")

from kvrouter.ray import RayVirtualCluster, VllmGeneration  # noqa: E402

# --- the cluster ---


def test_a_taken_port_is_passed_by_and_the_router_told(ray_node):
    config = sim_config()
    base = config["router_cfg"]["base_kv_events_port"]
    with socket.socket() as occupant:
        occupant.bind(("", base))
        occupant.listen()
        place = cluster()
        with VllmGeneration(place, config) as generation:
            first, second = generation.worker_addresses()
            assert first.kv_events_port != base
            assert second.kv_events_port == base + 1
            assert second.metrics_port == base + 33
            data = prompts(4, seed=12)
            generation.generate(data)
            settle(generation, 4 * 4)
            assert generation.generate(data)["overlap_blocks"] == [4] * 4
        place.shutdown()


def test_no_room_in_the_cluster_names_the_setting(ray_node, monkeypatch):
    monkeypatch.setattr("kvrouter.ray.virtual_cluster.PLACEMENT_TIMEOUT_S", 1.0)
    with pytest.raises(RuntimeError, match="lower bundle_ct_per_node_list"):
        RayVirtualCluster([10_000], use_gpus=False).get_placement_groups()
    for bad in ([], [0]):
        with pytest.raises(ValueError, match="bundle_ct_per_node_list"):
            RayVirtualCluster(bad)


def test_engines_of_several_bundles(ray_node):
    place = cluster(4)
    config = sim_config(vllm_cfg={"tensor_parallel_size": 2})
    with VllmGeneration(place, config) as generation:
        assert generation.dp_size == 2
        assert len(generation.worker_group.workers) == 4
        assert generation.worker_group.dp_leader_worker_indices == [0, 2]
        assert set(generation.generate(prompts(4))["gen_leader_worker_idx"]) == {0, 2}
    with pytest.raises(ValueError, match="tensor_parallel_size"):
        VllmGeneration(place, config, workers_per_node=3)
    place.shutdown()


def test_a_worker_killed_in_the_middle_of_a_batch(generation):
    data = prompts(64, seed=13)
    expected = generation.generate(data, greedy=True)["output_ids"]
    generation.update_weights({"w": np.zeros(2)})
    version = generation.weight_version
    victim = generation.worker_group.report(0)
    arrived = threading.Event()

    async def collect():
        results = {}
        async for index, result in generation.generate_async(data, greedy=True):
            results[index] = result
            if len(results) == 8:
                os.kill(victim.pid, signal.SIGKILL)
                arrived.set()
        return results

    results = asyncio.run(collect())
    assert arrived.is_set()
    assert sorted(results) == list(range(64))
    for index, result in results.items():
        assert (result["output_ids"][0] == expected[index]).all()
    assert generation.router_metrics()["retries"] > 0
    # It is started anew, with the fleet's weights and an empty place in the index, and routed to again.
    wait_until(lambda: generation.router.status()["workers"][0]["state"] == "up", "worker 0 to be heard again")
    wait_until(lambda: generation.worker_group.is_up(0), "worker 0 to serve again")
    again = generation.worker_group.report(0)
    assert again.pid != victim.pid
    assert (again.kv_events_port, again.weight_version) == (victim.kv_events_port, version)
    assert cached_blocks(generation)[0] == 0
    result = generation.generate(prompts(32, seed=14))
    assert set(result["gen_leader_worker_idx"]) == {0, 1}
    assert (result["weight_version"] == version).all()


def test_a_worker_that_comes_back_at_another_port_is_heard_there(generation):
    before = generation.worker_addresses()[0]
    with socket.socket() as occupant:
        occupant.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)

        def take_port_of(victim):
            """False when the worker was back first."""
            os.kill(victim.pid, signal.SIGKILL)
            while not (generation.worker_group.is_up(0) and generation.worker_group.report(0).pid != victim.pid):
                try:
                    occupant.bind(("", before.kv_events_port))
                except OSError:
                    continue
                occupant.listen()
                return True
            return False

        assert any(take_port_of(generation.worker_group.report(0)) for _ in range(10))
        wait_until(lambda: generation.worker_addresses()[0] != before, "worker 0 at another port")
        wait_until(lambda: generation.worker_group.is_up(0), "worker 0 to serve again")
    after = generation.worker_addresses()[0]
    assert ray.get(generation.worker_group.leader(0).get_kv_events_port.remote()) == after.kv_events_port
    data = prompts(8, seed=18)
    first = generation.generate(data)
    assert set(first["gen_leader_worker_idx"]) == {0, 1}
    settle(generation, 8 * 4)
    assert generation.generate(data)["overlap_blocks"] == [4] * 8
