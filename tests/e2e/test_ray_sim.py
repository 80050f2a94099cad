"""Rollouts on Ray over simulated engines: actors, ports, events and routing are real."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import pickle
import signal
import socket
import threading
import urllib.request

import numpy as np
import pytest
from ray_support import hits, prompts, router_cfg, sim_config, wait_until

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'kvrouter[ray]'")

from kvrouter import KvRouter, compute_block_hashes  # noqa: E402
from kvrouter.ray import (  # noqa: E402
    BatchedDataDict,
    RayVirtualCluster,
    RayWorkerBuilder,
    RoutedVllmWorkerGroup,
    VllmGeneration,
)

pytestmark = pytest.mark.usefixtures("ray_node")


def cluster(workers: int = 2) -> RayVirtualCluster:
    return RayVirtualCluster([workers], use_gpus=False, num_cpus_per_bundle=0.1)


@pytest.fixture(scope="module")
def shared(ray_node):
    """Two engines with a router.  Who kills a worker waits until it is back."""
    place = cluster()
    with VllmGeneration(place, sim_config()) as generation:
        yield generation
    place.shutdown()


@pytest.fixture
def generation(shared):
    """The same with empty caches, and a router that runs."""
    shared.invalidate_kv_cache()
    shared.prepare_for_generation()
    shared.router_metrics(clear=True)
    return shared


# --- shapes and order ---


def test_generate_has_the_shapes_of_nemo_rl(generation):
    data = prompts(6, padding=7)
    data["input_lengths"] = np.asarray([260, 1, 300, 64, 65, 128])
    result = generation.generate(data, greedy=True)
    assert isinstance(result, BatchedDataDict)
    assert result["output_ids"].shape == result["logprobs"].shape == (6, 308)
    assert result["output_ids"].dtype == np.int64
    assert result["logprobs"].dtype == np.float32
    assert result["generation_lengths"].tolist() == [8] * 6
    assert result["unpadded_sequence_lengths"].tolist() == [268, 9, 308, 72, 73, 136]
    for row, length in enumerate(data["input_lengths"]):
        assert (result["output_ids"][row, :length] == data["input_ids"][row, :length]).all()
        assert (result["output_ids"][row, length : length + 8] >= 3).all()
        assert not result["output_ids"][row, length + 8 :].any()  # _pad_token_id
    assert len(result["gen_leader_worker_idx"]) == 6


def test_tensors_in_tensors_out(generation):
    torch = pytest.importorskip("torch", reason="torch is not installed (it comes with vLLM)")
    data = {name: torch.from_numpy(column) for name, column in prompts(2).items()}
    result = generation.generate(data, greedy=True)
    assert isinstance(result["output_ids"], torch.Tensor)
    assert result["logprobs"].dtype == torch.float32


async def test_generate_async_yields_each_sample_with_its_index(generation):
    data = prompts(5, seed=1)
    expected = generation.generate(data, greedy=True)
    seen = {}
    async for index, result in generation.generate_async(data, greedy=True):
        assert result.size == 1
        seen[index] = result
    assert sorted(seen) == list(range(5))
    for index, result in seen.items():
        assert (result["output_ids"][0] == expected["output_ids"][index]).all()


async def test_a_caller_that_stops_iterating_cancels_the_rest(generation):
    data = prompts(8, seed=2)
    data["max_new_tokens"] = np.full(8, 4000)
    data["max_new_tokens"][0] = 1
    async for index, _ in generation.generate_async(data):
        assert index == 0
        break
    workers = lambda: generation.router.status()["workers"]  # noqa: E731
    await asyncio.to_thread(wait_until, lambda: all(w["running"] == 0 for w in workers()), "cancelled requests to end")


def test_generate_text(generation):
    result = generation.generate_text({"prompts": ["w5 w6 words", "w9"]}, greedy=True)
    assert [len(text.split()) for text in result["texts"]] == [8, 8]
    with pytest.raises(ValueError, match="prompts"):
        generation.generate_text({})


def test_a_prompt_that_no_engine_takes_is_an_error_not_a_lost_worker(generation):
    with pytest.raises(ValueError, match="token ids from 0 to 1023"):
        generation.generate({"input_ids": np.full((1, 8), 5000), "input_lengths": np.asarray([8])})
    assert generation.generate(prompts(2))["generation_lengths"].tolist() == [8, 8]


def test_a_prompt_as_long_as_the_model_takes_comes_back_alone(generation):
    ids = np.full((1, 8192), 5)
    result = generation.generate({"input_ids": ids, "input_lengths": np.asarray([8192])})
    assert result["generation_lengths"].tolist() == [0]
    assert (result["output_ids"] == ids).all()


# --- routing ---


def settle(generation, blocks: int) -> None:
    """Waits until the router knows of so many cached blocks."""
    held = lambda: sum(worker["cached_blocks"] for worker in generation.router.status()["workers"])  # noqa: E731
    wait_until(lambda: held() >= blocks, f"{blocks} blocks in the router's index")


def test_every_sample_goes_where_its_own_tokens_are_cached(generation):
    data = prompts(8, seed=3)
    first = generation.generate(data, greedy=True)
    settle(generation, 8 * 4)
    # Wider and otherwise padded, and in another order: the same prompts.
    order = np.random.default_rng(0).permutation(8)
    again = {"input_ids": np.full((8, 500), 9), "input_lengths": data["input_lengths"][order]}
    again["input_ids"][:, :260] = data["input_ids"][order, :260]
    second = generation.generate(again, greedy=True)
    assert second["num_cached_tokens"].tolist() == [hits(260)] * 8
    assert second["overlap_blocks"] == [4] * 8
    assert second["gen_leader_worker_idx"] == [first["gen_leader_worker_idx"][row] for row in order]


def test_samples_of_a_prompt_neither_scatter_nor_pile_up(ray_node):
    place = cluster(4)
    with VllmGeneration(place, sim_config()) as generation:
        groups = BatchedDataDict(prompts(8, seed=4)).repeat_interleave(16)
        result = generation.generate(groups)
        workers = np.asarray(result["gen_leader_worker_idx"]).reshape(8, 16)
        places = sum(len(set(group)) for group in workers.tolist())
        assert places <= 8 + 4, workers
        assert generation.router_metrics()["imbalance"] <= 1.5
        assert result["num_cached_tokens"].sum() >= (8 * 16 - places) * hits(260)
    place.shutdown()


def test_router_metrics(generation):
    data = prompts(6, seed=5)
    generation.generate(data)
    settle(generation, 6 * 4)
    generation.generate(data)
    figures = generation.router_metrics()
    assert figures["decisions"] == 12
    assert figures["predicted_hit_rate"] == figures["actual_hit_rate"] == hits(260) / 260 / 2
    assert 0 < figures["decision_us_p50"] <= figures["decision_us_p99"]
    assert sum(figures["requests_per_worker"]) == 12
    assert sum(figures["tokens_per_worker"]) == 12 * 268
    assert (figures["fallbacks"], figures["retries"]) == (0, 0)
    assert generation.get_step_metrics()["router/decisions"] == 12.0
    assert generation.router_metrics()["decisions"] == 0  # the step's end


def test_emptied_caches_are_forgotten_at_once(generation):
    data = prompts(4, seed=6)
    generation.generate(data)
    settle(generation, 4 * 4)
    assert generation.finish_generation()
    assert sum(worker["cached_blocks"] for worker in generation.router.status()["workers"]) == 0
    assert generation.prepare_for_generation()
    result = generation.generate(data)
    assert result["num_cached_tokens"].tolist() == [0] * 4
    assert result["overlap_blocks"] == [0] * 4


def test_weight_updates_empty_the_caches_unless_they_are_to_be_kept(generation):
    data = prompts(4, seed=7)
    before = generation.generate(data)["weight_version"]
    settle(generation, 4 * 4)
    assert generation.update_weights({"w": np.zeros(2)}, keep_kv_cache=True)
    kept = generation.generate(data)
    assert kept["num_cached_tokens"].tolist() == [hits(260)] * 4
    assert (kept["weight_version"] == before + 1).all()
    assert generation.update_weights({"w": np.zeros(2)})
    fresh = generation.generate(data)
    assert fresh["num_cached_tokens"].tolist() == [0] * 4
    assert generation.weight_version == int(fresh["weight_version"][0])
    with pytest.raises(ValueError, match="either state_dict or path"):
        generation.update_weights()


# --- one router for all ---


def test_another_process_asks_the_same_router(generation):
    data = prompts(6, seed=8)
    generation.generate(data)
    settle(generation, 6 * 4)
    decisions = generation.router.status()["decisions"]

    @ray.remote(num_cpus=0)
    class TrajectoryCollector:
        def __init__(self, generation):
            self.generation = generation

        async def collect(self, data):
            return [result async for _, result in self.generation.generate_async(data)]

        def invalidate(self):
            return self.generation.invalidate_kv_cache(), self.generation.shutdown()

    collector = TrajectoryCollector.remote(generation)
    results = ray.get(collector.collect.remote(data))
    assert [int(result["num_cached_tokens"][0]) for result in results] == [hits(260)] * 6
    assert generation.router.status()["decisions"] == decisions + 6
    # Its requests count in the owner's figures, and it can empty caches, but not end the fleet.
    assert generation.router_metrics()["decisions"] == 12
    assert ray.get(collector.invalidate.remote()) == (True, True)
    assert sum(worker["cached_blocks"] for worker in generation.router.status()["workers"]) == 0
    assert generation.generate(data)["generation_lengths"].tolist() == [8] * 6
    ray.kill(collector)


def test_a_copy_without_an_answer_from_the_router_goes_round_robin(generation, caplog):
    copy = pickle.loads(pickle.dumps(generation))
    copy.router.url = "http://127.0.0.1:9"  # nobody listens there
    with caplog.at_level(logging.WARNING, "kvrouter.ray"):
        result = copy.generate(prompts(6, seed=9))
        copy.generate(prompts(6, seed=9))
    assert sorted(result["gen_leader_worker_idx"]) == [0, 0, 0, 1, 1, 1]
    assert [record.message.startswith("the router does not answer") for record in caplog.records] == [True]
    assert generation.router_metrics()["fallbacks"] == 12


def test_others_ask_over_http(generation):
    tokens = prompts(1, seed=10)["input_ids"][0, :260]
    body = {"local_hashes": compute_block_hashes(tokens).tolist(), "num_tokens": 260}
    request = urllib.request.Request(f"{generation.router.url}/find_best_worker", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert json.loads(answer.read())["worker_id"] in (0, 1)


# --- start, stop, failure ---


def test_the_router_starts_and_stops_twice_from_anywhere(generation):
    async def in_a_loop():
        assert await generation.stop_router()
        assert await generation.stop_router()
        assert generation.router is None
        assert await generation.start_router()
        assert await generation.start_router()
        return generation.generate(prompts(2))["generation_lengths"].tolist()  # sync, in a running loop

    for _ in range(2):  # the router belongs to neither loop
        assert asyncio.run(in_a_loop()) == [8, 8]
    assert asyncio.run(generation.stop_router())
    assert generation.prepare_for_generation()
    assert generation.router is not None


def test_without_a_router_in_turn(generation):
    asyncio.run(generation.stop_router())
    result = generation.generate(prompts(6, seed=11))
    assert sorted(result["gen_leader_worker_idx"]) == [0, 0, 0, 1, 1, 1]
    assert result["overlap_blocks"] == [None] * 6
    assert generation.router_metrics()["decisions"] == 0


def test_a_router_that_cannot_start_is_said_once_and_training_goes_on(ray_node, caplog):
    place = cluster()
    with caplog.at_level(logging.WARNING, "kvrouter.ray"):
        generation = VllmGeneration(place, sim_config(router_cfg=router_cfg(policy="clairvoyant")))
    try:
        failures = [record.message for record in caplog.records if "Failed to initialize router" in record.message]
        assert len(failures) == 1
        assert "Failed to initialize router: policy 'clairvoyant' is unknown" in failures[0]
        result = generation.generate(prompts(4))
        assert sorted(result["gen_leader_worker_idx"]) == [0, 0, 1, 1]
    finally:
        assert generation.shutdown()
        assert generation.shutdown()
        place.shutdown()


def test_round_robin_on_purpose(ray_node):
    place = cluster()
    with VllmGeneration(place, sim_config(router_cfg=router_cfg(mode="round_robin"))) as generation:
        assert generation.router_mode == "round_robin"
        same = BatchedDataDict(prompts(1)).repeat_interleave(6)
        assert sorted(generation.generate(same)["gen_leader_worker_idx"]) == [0, 0, 0, 1, 1, 1]
        assert generation.router_metrics()["decisions"] == 6
    place.shutdown()


def test_a_block_size_that_is_not_the_engines_is_no_router(ray_node, caplog):
    place = cluster(1)
    with caplog.at_level(logging.WARNING, "kvrouter.ray"):
        generation = VllmGeneration(place, sim_config(sim_cfg={"block_size": 32, "time_scale": 0.0}))
    with generation:
        assert generation.router is None
        assert any("set router_cfg.block_size" in record.message for record in caplog.records)
    place.shutdown()


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
    held = lambda: [worker["cached_blocks"] for worker in generation.router.status()["workers"]]  # noqa: E731
    victim = ray.get(generation.worker_group.leader(0).report.remote())
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
    again = ray.get(generation.worker_group.leader(0).report.remote())
    assert again.pid != victim.pid
    assert (again.kv_events_port, again.weight_version) == (victim.kv_events_port, version)
    assert held()[0] == 0
    result = generation.generate(prompts(32, seed=14))
    assert set(result["gen_leader_worker_idx"]) == {0, 1}
    assert (result["weight_version"] == version).all()


# --- manual and integrated ---


def test_manual_mode(generation):
    asyncio.run(generation.stop_router())
    addresses = generation.worker_addresses()
    with KvRouter(
        num_workers=2,
        base_kv_events_port=generation.cfg["router_cfg"]["base_kv_events_port"],
        base_metrics_port=generation.cfg["router_cfg"]["base_metrics_port"],
        worker_addresses=[address.host for address in addresses],
        worker_ports=[address.kv_events_port for address in addresses],
    ) as router:
        assert router.wait_until_connected(30)
        data = prompts(1, seed=15)

        async def to(worker):
            results = [result async for _, result in generation.generate_async(data, worker_id=worker)]
            return results[0]

        assert asyncio.run(to(1))["gen_leader_worker_idx"] == [1]
        wait_until(lambda: router.status()["workers"][1]["cached_blocks"] >= 4, "the events of worker 1")
        assert router.best_worker(tokens=data["input_ids"][0, :260]) == 1
        assert asyncio.run(to(1))["num_cached_tokens"].tolist() == [hits(260)]
    with pytest.raises(ValueError, match="worker_id must be from 0 to 1"):
        asyncio.run(to(2))


async def test_integrated_mode(ray_node):
    place = cluster()
    group = RoutedVllmWorkerGroup(place, RayWorkerBuilder(config=sim_config()), router_config=router_cfg())
    try:
        with pytest.raises(RuntimeError, match=r"Router not started. Call await start_router\(\) first."):
            await group.get_best_worker_id([1, 2, 3])
        await group.start_router(enable_kv_indexer=True)
        await group.start_router()
        data = BatchedDataDict(prompts(6, seed=16))
        rows = list(data.rows())
        tokens = [row["input_ids"][0, :260] for row in rows]
        workers = await group.get_best_worker_ids_batch(tokens)
        refs = [
            group.run_single_worker_single_data("generate", group.get_dp_leader_worker_idx(worker), data=row)
            for worker, row in zip(workers, rows, strict=True)
        ]
        assert [result["num_cached_tokens"][0] for result in await asyncio.gather(*refs)] == [0] * 6
        held = lambda: sum(worker["cached_blocks"] for worker in group.router.status()["workers"])  # noqa: E731
        await asyncio.to_thread(wait_until, lambda: held() >= 24, "24 blocks in the router's index")
        # By tokens, by hashes, one by one: the same answer.
        hashes = [compute_block_hashes(of_prompt) for of_prompt in tokens]
        assert await group.get_best_worker_ids_batch(tokens) == workers
        assert await group.get_best_worker_ids_batch(hashes, [260] * 6) == workers
        assert [await group.get_best_worker_id(of_prompt) for of_prompt in tokens] == workers
        assert [await group.get_best_worker_id(of_prompt, 260) for of_prompt in hashes] == workers
        ref = await group.generate_with_routing("generate", hashes[0], 260, data=rows[0], greedy=True)
        assert (await ref)["num_cached_tokens"].tolist() == [hits(260)]
        turns = [await group.get_worker_round_robin(hashes[0], 260) for _ in range(4)]
        assert sorted(turns) == [0, 0, 1, 1]
        with pytest.raises(ValueError, match="6 lists of hashes for 1 numbers of tokens"):
            await group.get_best_worker_ids_batch(hashes, [260])
        with pytest.raises(ValueError, match="num_tokens must be positive"):
            await group.get_best_worker_id([], 0)
    finally:
        assert await group.shutdown_async()
        assert await group.shutdown_async()
        place.shutdown()


async def test_integrated_mode_with_routing_disabled(ray_node):
    place = cluster(1)
    group = RoutedVllmWorkerGroup(place, RayWorkerBuilder(config=sim_config(router_cfg=None)))
    try:
        with pytest.raises(RuntimeError, match="Cannot start router when routing is disabled"):
            await group.start_router()
        with pytest.raises(RuntimeError, match="Routing is disabled"):
            await group.get_best_worker_id([1])
    finally:
        assert group.shutdown()
        place.shutdown()
