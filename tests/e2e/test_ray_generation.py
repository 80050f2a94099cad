"""VllmGeneration over simulated engines: shapes, order, routing, weights.  Actors, ports and events are real."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from ray_support import cached_blocks, cluster, hits, prompts, settle, sim_config, wait_until

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'kvrouter[ray]'")

from kvrouter.ray import BatchedDataDict, VllmGeneration  # noqa: E402

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
    assert sum(cached_blocks(generation)) == 0
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
