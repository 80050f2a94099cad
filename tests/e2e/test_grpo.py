"""GRPO training in real actors: what the router may and may not change, refit, resume, loss of a worker."""

from __future__ import annotations

import copy
import json
import logging
import os
from dataclasses import asdict

import numpy as np
import pytest
from ray_support import router_cfg, wait_until

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'kvrouter[ray]'")

from grpo_support import (  # noqa: E402
    EvenCharacters,
    on_vllm,
    same_learning,
    same_weights,
    sampled,
    sim_training,
    train,
    train_and_kill_a_worker,
)

from kvrouter.grpo import config_from, grpo_train, setup  # noqa: E402
from kvrouter.grpo.data import problems_of_step  # noqa: E402
from kvrouter.grpo.records import read_metrics  # noqa: E402
from kvrouter.grpo.rollout import roll_out, sample_seeds  # noqa: E402
from kvrouter.grpo.steps import limits, refit  # noqa: E402
from kvrouter.grpo.tokenizer import character_tokenizer  # noqa: E402
from kvrouter.grpo.training import generation_settings  # noqa: E402
from kvrouter.ray import background  # noqa: E402

pytestmark = pytest.mark.usefixtures("ray_node")


def test_the_router_changes_no_result(tmp_path):
    routed, weights = train(sim_training(tmp_path / "on"))
    in_turn, same = train(sim_training(tmp_path / "off", router={"enabled": False}))
    same_learning(routed, in_turn)
    assert same_weights(weights, same)
    assert sampled(tmp_path / "on") == sampled(tmp_path / "off")  # token for token
    assert any(row["grad_norm"] > 0 for row in routed if "reward_mean" in row)
    assert all(row["router/decisions"] == 16 for row in routed if "reward_mean" in row)
    assert all(row["router/decisions"] == 0 for row in in_turn if "reward_mean" in row)


def test_what_metrics_jsonl_holds(tmp_path):
    config = sim_training(tmp_path, steps=2)
    config.logger.plots_enabled = True
    rows, _ = train(config)
    written = [json.loads(line) for line in (tmp_path / "log" / "metrics.jsonl").read_text().splitlines()]
    assert written == rows
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert {"reward_mean", "generation_s", "train_s", "refit_s", "hit_rate", "router_us_p99", "kl"} <= set(rows[1])
    assert [("validation_accuracy" in row) for row in rows] == [True, False, True]
    assert [row["weight_version"] for row in rows[1:]] == [0, 1]  # those behind the step before
    assert (tmp_path / "log" / "training.png").stat().st_size > 0
    assert (tmp_path / "log" / "config.yaml").exists()


def test_after_a_refit_the_router_believes_nothing_to_be_cached(tmp_path):
    config = sim_training(tmp_path)
    with setup(config) as training:
        refit(training)
        problems = problems_of_step(training.train, 0, 4, True, 0)

        def cached():
            return sum(worker["cached_blocks"] for worker in training.generation.router.status()["workers"])

        def rollout():
            episodes = background.run(
                roll_out(
                    training.generation,
                    EvenCharacters(),
                    problems,
                    training.tokenizer,
                    limits(training),
                    seeds=sample_seeds(0, 0, 4),
                )
            )
            predicted = training.generation.router_metrics(clear=True)["predicted_hit_rate"]
            return sum(episode.cached_tokens for episode in episodes), predicted

        rollout()
        wait_until(lambda: cached() >= 5, "the first rollout's blocks in the index")
        # Caches that are kept on purpose: what the router believes, and what the engines have, is there.
        refit(training, keep_kv_cache=True)
        assert cached() >= 5
        tokens, predicted = rollout()
        assert tokens > 0
        assert predicted > 0
        wait_until(lambda: cached() >= 5, "blocks in the index")
        # Caches that are emptied: nothing is believed, at once, in index and prediction.
        refit(training)
        assert cached() == 0
        prompt = np.asarray(training.tokenizer.encode(problems[0].prompt))
        (choice,) = background.run(training.generation.router.choose([prompt]))
        assert choice.overlap_blocks == 0
        rollout()
        # With the first new blocks, it goes on.
        wait_until(lambda: cached() >= 5, "the new blocks in the index")
        tokens, predicted = rollout()
        assert tokens > 0
        assert predicted > 0


def test_a_resumed_training_is_the_one_that_was_interrupted(tmp_path):
    whole, weights = train(sim_training(tmp_path / "whole", steps=4))

    class Interrupted(Exception):
        pass

    def interrupt(row):
        if row["step"] == 3:  # after the checkpoint of step 2
            raise Interrupted

    config = sim_training(tmp_path / "parts", steps=4, checkpoints=True)
    with pytest.raises(Interrupted):
        train(config, interrupt)
    assert [row["step"] for row in read_metrics(tmp_path / "parts" / "log")] == [0, 1, 2, 3]
    config.grpo.router = router_cfg()
    other = copy.deepcopy(config)
    other.grpo.seed += 1
    with pytest.raises(ValueError, match=r"is of another model, dataset or seed: set checkpointing\.checkpoint_dir"):
        setup(other)
    resumed, same = train(config)
    assert [row["step"] for row in resumed] == [0, 1, 2, 3, 4]
    same_learning(whole, resumed)
    assert same_weights(weights, same)
    assert sorted(os.listdir(tmp_path / "parts" / "checkpoints")) == ["step_2", "step_4"]


def test_a_worker_killed_in_mid_training(tmp_path):
    config = sim_training(tmp_path / "killed", steps=4)
    rows, killed = train_and_kill_a_worker(config)
    undisturbed, weights = train(sim_training(tmp_path / "undisturbed", steps=4))
    same_learning(rows, undisturbed)
    assert same_weights(killed, weights)


def test_a_router_that_cannot_start_is_said_and_training_goes_on(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    rows, _ = train(sim_training(tmp_path, steps=1, router={**router_cfg(), "policy": "no_such_policy"}))
    assert [message for message in caplog.messages if message.startswith("Failed to initialize router: ")]
    assert rows[-1]["router/decisions"] == 0
    assert rows[-1]["grad_norm"] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "megatron"}, "policy.generation.backend must be 'vllm'"),
        ({"vllm_cfg": {"async_engine": False}}, "Please enable async_engine"),
        ({"vllm_cfg": {"max_model_length": 1}}, "did you mean max_model_len"),
        ({"temperature": 0.0}, "policy.generation.temperature must be above 0"),
    ],
)
def test_what_cannot_be_trained_is_refused(tmp_path, change, message, caplog):
    config = asdict(sim_training(tmp_path))
    config["policy"]["generation"].update(change)
    del config["policy"]["generation"]["colocated"]
    with pytest.raises(ValueError, match=message):
        setup(config_from(config))
    said = "Router is only supported with vLLM backend" in caplog.messages
    assert said == ("backend" in change)


def test_a_prompt_too_long_is_refused_with_the_keys_to_set(tmp_path):
    config = sim_training(tmp_path)
    config.data.max_input_seq_length = 100
    with pytest.raises(ValueError, match=r"100 are allowed: set data\.max_input_seq_len"):
        setup(config)


@pytest.mark.vllm
def test_real_engines_sample_from_the_weights_of_each_step(tmp_path):
    config = on_vllm(sim_training(tmp_path))
    with setup(config) as training:
        training.environment = EvenCharacters()
        before = training.policy.weights()["model.embed_tokens.weight"].clone()
        rows = grpo_train(training)[1:]
        moved = (training.policy.weights()["model.embed_tokens.weight"] - before).abs().max()
    assert [row["weight_version"] for row in rows] == [0, 1, 2]
    # Every step moves the weights much further than this: engines with those of another step would show it.
    assert max(row["sampled_prob_error"] for row in rows) < 1e-5
    assert moved > 1e-3
    assert all(row["grad_norm"] > 0 for row in rows)
    # Four samples of a prompt, five blocks of it cached by the first.
    assert all(row["hit_rate"] > 0.5 for row in rows)
    assert all(row["router/decisions"] == 16 for row in rows)


def test_seeded_samples_on_cpu_have_no_chunked_prefill(tmp_path):
    config = sim_training(tmp_path)
    config.policy.generation.engine = "vllm"
    tokenizer = character_tokenizer()
    kwargs = generation_settings(config, "model", tokenizer)["vllm_kwargs"]
    assert kwargs == {"enable_chunked_prefill": False, "max_num_batched_tokens": 2048}
    config.policy.generation.vllm_kwargs = {"enable_chunked_prefill": True}
    with pytest.raises(ValueError, match="enable_chunked_prefill must be false on CPU"):
        generation_settings(config, "model", tokenizer)
    config.cluster.use_gpus = True
    assert generation_settings(config, "model", tokenizer)["vllm_kwargs"] == {"enable_chunked_prefill": True}
