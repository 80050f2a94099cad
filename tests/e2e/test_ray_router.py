"""One router for all processes of a job, and what happens without one."""

from __future__ import annotations

import asyncio
import json
import logging
import pickle
import urllib.request

import pytest
from ray_support import cached_blocks, cluster, hits, prompts, router_cfg, settle, sim_config

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'kvrouter[ray]'")

from kvrouter import compute_block_hashes  # noqa: E402
from kvrouter.ray import BatchedDataDict, VllmGeneration  # noqa: E402
from kvrouter.ray.engine.base import SampleRequest  # noqa: E402

# --- one router for all ---


def test_the_router_is_told_what_the_engines_found(generation):
    data = prompts(6, seed=7)
    generation.generate(data)
    settle(generation, 6 * 4)
    generation.generate(data)
    hits_told = [worker["hits"] for worker in generation.router.status()["workers"]]
    assert sum(told["reports"] for told in hits_told) == 12
    assert sum(told["predicted_tokens"] for told in hits_told) == 6 * hits(260)
    assert sum(told["cached_tokens"] for told in hits_told) == 6 * hits(260)


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
    assert sum(cached_blocks(generation)) == 0
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


def test_the_router_hears_what_became_of_its_requests():
    generation = VllmGeneration(cluster(), sim_config(router_cfg=router_cfg(policy="adaptive")))
    try:
        group = generation.worker_group
        router = group.router._api.router
        data = prompts(6, seed=12)
        requests = [SampleRequest(row[:260]) for row in data["input_ids"]]

        async def decide_and_serve():
            choices, fallback = await group.choose(requests)
            assert not fallback
            answers = [answer async for answer in group.generate_samples(requests, choices=choices)]
            return choices, answers

        choices, answers = asyncio.run(decide_and_serve())
        assert len(answers) == 6
        assert all(choice.ticket for choice in choices)
        # Each is known to be done: its ticket is none any more.
        assert [router.complete(choice.ticket) for choice in choices] == [False] * 6
        # One that was decided and not sent still counts.
        (left,), _ = asyncio.run(group.choose(requests[:1]))
        assert router.complete(left.ticket)
    finally:
        generation.shutdown()


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
