from __future__ import annotations

import pytest

from kvrouter.ray.config import check_generation_config, engine_arguments, model_parallel_size, router_config_from

ROUTER = {"enabled": True, "block_size": 32, "base_kv_events_port": 6000, "base_metrics_port": 6100}


def config(**changes):
    return {"model_name": "m", "max_new_tokens": 4, **changes}


def test_the_guides_spelling():
    assert router_config_from({"grpo": {"router": ROUTER}, "policy": {"generation": {}}}) == ROUTER


def test_nemo_rls_spelling():
    assert router_config_from({"policy": {"generation": {"router_cfg": ROUTER}}}) == ROUTER


def test_both_spellings_the_guides_wins():
    both = {"grpo": {"router": {"enabled": False}}, "policy": {"generation": {"router_cfg": ROUTER}}}
    assert router_config_from(both) == ROUTER | {"enabled": False}


def test_defaults_and_absence():
    assert router_config_from({"grpo": {}, "policy": {"generation": {}}}) is None
    assert router_config_from({"grpo": {"router": {"enabled": True}}}) == {
        "enabled": True,
        "block_size": 64,
        "base_kv_events_port": 5557,
        "base_metrics_port": 5657,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "sglang"}, "backend must be 'vllm', not 'sglang'"),
        ({"engine": "trt"}, "engine must be 'vllm' or 'sim'"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"vllm_cfg": {"tensor_paralel_size": 2}}, "tensor_paralel_size is unknown: did you mean tensor_parallel_size"),
        ({"vllm_cfg": {"quantization": "fp8"}}, "quantization is unknown: .* vllm_kwargs"),
        ({"vllm_cfg": {"expert_parallel_size": 2}}, "enable_expert_parallel"),
        ({"vllm_cfg": {"async_engine": False}, "router_cfg": ROUTER}, "Please enable async_engine in your vLLM config"),
    ],
)
def test_configs_that_cannot_be_served(changes, message):
    with pytest.raises(ValueError, match=message):
        check_generation_config(config(**changes))


@pytest.mark.parametrize("missing", ["model_name", "max_new_tokens"])
def test_missing_keys(missing):
    with pytest.raises(ValueError, match=f"lacks {missing}"):
        check_generation_config({key: value for key, value in config().items() if key != missing})


def test_the_sync_engine_is_fine_without_a_router():
    check_generation_config(config(vllm_cfg={"async_engine": False}, router_cfg=ROUTER | {"enabled": False}))


def test_engine_arguments():
    given = config(
        seed=7,
        router_cfg=ROUTER,
        vllm_cfg={"precision": "bfloat16", "max_model_len": 512, "tensor_parallel_size": 2, "env_vars": {"A": "1"}},
        vllm_kwargs={"max_num_seqs": 3},
        colocated={"enabled": True},
    )
    arguments = engine_arguments(given, rank=3)
    assert arguments["model"] == "m"
    assert arguments["dtype"] == "bfloat16"
    assert arguments["block_size"] == 32
    assert arguments["seed"] == 10  # workers do not sample the same
    assert arguments["max_num_seqs"] == 3
    assert arguments["distributed_executor_backend"] == "mp"
    assert arguments["enable_sleep_mode"] is True
    assert arguments["enable_prefix_caching"] is True
    assert "env_vars" not in arguments
    assert model_parallel_size(given) == 2
    with pytest.raises(ValueError, match="tensor_parallel_size must be at least 1"):
        model_parallel_size(config(vllm_cfg={"tensor_parallel_size": 0}))
