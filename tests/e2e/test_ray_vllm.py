"""Rollouts on Ray over real vLLM engines."""

from __future__ import annotations

import os
import signal
import threading

import numpy as np
import pytest
from ray_support import cached_blocks, hits, prompts, router_cfg, settle, wait_until

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'kvrouter[ray]'")

from kvrouter.ray import RayVirtualCluster, VllmGeneration  # noqa: E402

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("ray_node")]

NEW_TOKENS = 6


def config(tiny_model, **vllm_cfg):
    return {
        "model_name": str(tiny_model.path),
        "max_new_tokens": NEW_TOKENS,
        "ignore_eos": True,
        "router_cfg": router_cfg(),
        "vllm_cfg": {
            "async_engine": True,
            "precision": "float32",
            "max_model_len": 1024,
            "enforce_eager": True,
            "load_format": "dummy",
            "env_vars": {"VLLM_CPU_KVCACHE_SPACE": "1"},
            **vllm_cfg,
        },
        "vllm_kwargs": {
            "tokenizer": str(tiny_model.tokenizer),
            "num_gpu_blocks_override": 256,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 1024,
        },
    }


@pytest.fixture(scope="module")
def generation(ray_node, tiny_model):
    """Two engines with a router.  Who kills a worker waits until it is back."""
    place = RayVirtualCluster([2], use_gpus=False)
    with VllmGeneration(place, config(tiny_model)) as fleet:
        yield fleet
    place.shutdown()


def policy(tiny_model, seed):
    """The model with weights of its own, in transformers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_model.path)).float().eval()


def check_greedy(model, data, result) -> None:
    """The response is the model's own greedy one, and its logprobs are the model's."""
    import torch

    for row, length in enumerate(data["input_lengths"].tolist()):
        output = result["output_ids"][row, : length + NEW_TOKENS]
        with torch.no_grad():
            logprobs = torch.log_softmax(model(torch.as_tensor(output[None, :-1])).logits[0, length - 1 :], -1)
        best, _ = logprobs.max(-1)
        response = torch.as_tensor(output[length:])
        assert torch.allclose(logprobs.gather(-1, response[:, None])[:, 0], best, atol=1e-3)
        assert np.allclose(result["logprobs"][row, length : length + NEW_TOKENS], best.numpy(), atol=1e-3)
        assert not result["logprobs"][row, :length].any()


def test_what_is_routed_is_what_is_cached(generation):
    generation.invalidate_kv_cache()
    data = prompts(8)
    first = generation.generate(data, greedy=True)
    assert first["num_cached_tokens"].tolist() == [0] * 8
    settle(generation, 8 * 4)
    again = generation.generate(data, greedy=True)
    assert again["num_cached_tokens"].tolist() == [hits(260)] * 8
    assert again["overlap_blocks"] == [4] * 8
    assert (again["output_ids"] == first["output_ids"]).all()
    assert set(again["gen_leader_worker_idx"]) == {0, 1}
    figures = generation.router_metrics(clear=True)
    assert figures["predicted_hit_rate"] == figures["actual_hit_rate"] > 0
    assert generation.finish_generation()
    assert generation.generate(data, greedy=True)["num_cached_tokens"].tolist() == [0] * 8


def test_texts_go_through_the_models_tokenizer(generation):
    result = generation.generate_text({"prompts": ["w5 w6 w7", "w8"]}, greedy=True)
    assert [len(text.split()) for text in result["texts"]] == [NEW_TOKENS] * 2


def test_weights_from_a_state_dict_a_checkpoint_and_a_broadcast(generation, tiny_model, tmp_path):
    from kvrouter.ray.collective import WeightGroup, refit_info
    from kvrouter.vllm.ports import find_free_ports

    data = prompts(4, seed=1)
    first, second, third = (policy(tiny_model, seed) for seed in (1, 2, 3))

    assert generation.update_weights(first.state_dict())
    check_greedy(first, data, generation.generate(data, greedy=True))

    second.save_pretrained(tmp_path)
    assert generation.update_weights(path=str(tmp_path))
    result = generation.generate(data, greedy=True)
    assert result["num_cached_tokens"].tolist() == [0] * 4  # nothing of the old weights
    check_greedy(second, data, result)

    weights = [(name, tensor) for name, tensor in third.state_dict().items() if name != "lm_head.weight"]
    ports = find_free_ports(1)
    port = ports.base
    ports.release()
    joined = generation.init_collective("127.0.0.1", port, 3)
    group = WeightGroup("127.0.0.1", port, 0, 3)
    ray.get(joined)
    generation.prepare_refit_info(refit_info(weights))
    received = generation.update_weights_from_collective()
    group.send(weights)
    versions = ray.get(received)
    assert versions == [generation.weight_version] * 2
    assert generation.invalidate_kv_cache()
    check_greedy(third, data, generation.generate(data, greedy=True))
    # What the next test restarts needs weights that can be loaded again.
    assert generation.update_weights(first.state_dict())


def test_an_engine_killed_in_the_middle_of_a_batch(generation, tiny_model, processes_under):
    model = policy(tiny_model, 1)
    assert generation.update_weights(model.state_dict())
    data = prompts(32, seed=2)
    victim = generation.worker_group.report(0)
    family = processes_under(victim.pid)
    assert len(family) > 1  # the engine has processes of its own
    timer = threading.Timer(0.3, os.kill, (victim.pid, signal.SIGKILL))
    timer.start()
    result = generation.generate(data, greedy=True)
    timer.join()
    check_greedy(model, data, result)
    # The same again, however quick the batch was: whoever is asked for worker 0 finds it dead, and others serve.
    check_greedy(model, data, generation.generate(data, greedy=True))
    wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in family), "the engine's processes to be gone")
    wait_until(lambda: generation.worker_group.is_up(0), "worker 0 to serve again", timeout_s=300)
    assert cached_blocks(generation)[0] == 0
    fresh = prompts(8, seed=3)
    result = generation.generate(fresh, greedy=True)
    assert set(result["gen_leader_worker_idx"]) == {0, 1}
    check_greedy(model, fresh, result)
    assert result["weight_version"].tolist() == [generation.weight_version] * 8


def test_tensor_parallelism(ray_node, tiny_model):
    model = policy(tiny_model, 4)
    place = RayVirtualCluster([2], use_gpus=False)
    try:
        with VllmGeneration(place, config(tiny_model, tensor_parallel_size=2)) as generation:
            assert (generation.dp_size, len(generation.worker_group.workers)) == (1, 2)
            assert generation.update_weights(model.state_dict())
            data = prompts(4, seed=5)
            check_greedy(model, data, generation.generate(data, greedy=True))
            settle(generation, 4 * 4)
            assert generation.generate(data, greedy=True)["overlap_blocks"] == [4] * 4
    finally:
        place.shutdown()
