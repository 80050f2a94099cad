"""Rollouts beside training: the same learning, samples of a bounded age, refit in flight, resume, loss of a worker."""

from __future__ import annotations

import json

import pytest
from ray_support import cached_blocks, router_cfg, wait_until

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

from kvrouter.grpo import async_grpo_train, setup  # noqa: E402
from kvrouter.grpo.async_trainer import RolloutsAhead  # noqa: E402
from kvrouter.grpo.steps import refit  # noqa: E402

pytestmark = pytest.mark.usefixtures("ray_node")


def async_training(folder, *, age=1, in_flight=False, recompute=True, **changes):
    config = sim_training(
        folder,
        async_grpo={
            "enabled": True,
            "max_trajectory_age_steps": age,
            "in_flight_weight_updates": in_flight,
            "recompute_kv_cache_after_weight_updates": recompute,
        },
        **changes,
    )
    config.loss_fn.use_importance_sampling_correction = True
    return config


def test_learns_what_the_synchronous_trainer_learns(tmp_path):
    # Simulated tokens do not depend on weights: older ones sample the same.
    config = sim_training(tmp_path / "sync", steps=4)
    config.loss_fn.use_importance_sampling_correction = True
    rows, weights = train(config)
    for name, router in (("on", None), ("off", {"enabled": False})):
        others, same = train(async_training(tmp_path / name, steps=4, router=router))
        same_learning(rows, others)
        assert same_weights(weights, same)
        assert sampled(tmp_path / "sync") == sampled(tmp_path / name)


@pytest.mark.parametrize(("age", "in_flight", "recompute"), [(1, False, True), (2, True, False), (3, True, True)])
def test_no_sample_is_older_than_allowed(tmp_path, age, in_flight, recompute):
    rows, _ = train(async_training(tmp_path, steps=5, age=age, in_flight=in_flight, recompute=recompute))
    trained = [row for row in rows if "reward_mean" in row]
    # The first step has the first weights; from then on, rollouts are as far ahead as they may be.
    assert [row["trajectory_age_max"] for row in trained] == [min(step, age) for step in range(5)]
    lines = [json.loads(line) for line in (tmp_path / "log" / "rollouts.jsonl").read_text().splitlines()]
    assert len(lines) == 5 * 16
    assert all(0 <= line["step"] - 1 - line["weight_version"] <= age for line in lines)
    assert all(row["router/decisions"] == 16 for row in trained)


@pytest.mark.parametrize("recompute", [True, False])
def test_a_refit_empties_the_index_only_where_it_empties_the_caches(tmp_path, recompute):
    config = async_training(tmp_path, steps=9, recompute=recompute)
    with setup(config) as training:
        training.environment = EvenCharacters()
        refit(training)
        source = RolloutsAhead(training)
        source.start(1)
        source.take(1)
        source.take(2)  # nothing is under way now
        wait_until(lambda: sum(cached_blocks(training.generation)) >= 10, "two prefixes' blocks in the index")
        begin, source._begin_up_to = source._begin_up_to, lambda step: None  # nor will be
        source.refit()
        assert (sum(cached_blocks(training.generation)) == 0) == recompute
        source._begin_up_to = begin
        source.close()


def test_a_resumed_training_samples_and_learns_from_the_same_problems(tmp_path):
    # On simulated engines, whose tokens no weights change: real ones sample the first steps from younger weights.
    whole, weights = train(async_training(tmp_path / "whole", steps=4))

    class Interrupted(Exception):
        pass

    def interrupt(row):
        if row["step"] == 3:  # after the checkpoint of step 2, with the rollouts of step 4 under way
            raise Interrupted

    config = async_training(tmp_path / "parts", steps=4, checkpoints=True)
    with pytest.raises(Interrupted):
        train(config, interrupt)
    config.grpo.router = router_cfg()
    resumed, same = train(config)
    assert [row["step"] for row in resumed] == [0, 1, 2, 3, 4]
    same_learning(whole, resumed)
    assert same_weights(weights, same)
    assert sampled(tmp_path / "whole") == sampled(tmp_path / "parts")


def test_a_worker_killed_in_mid_training(tmp_path):
    config = async_training(tmp_path / "killed", steps=4, in_flight=True)
    rows, killed = train_and_kill_a_worker(config)
    undisturbed, weights = train(async_training(tmp_path / "undisturbed", steps=4, in_flight=True))
    same_learning(rows, undisturbed)
    assert same_weights(killed, weights)
    assert sampled(tmp_path / "killed") == sampled(tmp_path / "undisturbed")


def test_what_a_rollout_fails_with_ends_the_training(tmp_path):
    class Broken(EvenCharacters):
        def respond(self, problem, turn, response):
            raise ZeroDivisionError

    config = async_training(tmp_path)
    config.grpo.val_at_start = False
    with setup(config) as training:
        training.environment = Broken()
        with pytest.raises(ZeroDivisionError):
            async_grpo_train(training)
        assert training.generation.router is None


def test_older_samples_are_not_learnt_from_without_correction(tmp_path):
    config = sim_training(tmp_path)
    with setup(config) as training, pytest.raises(ValueError, match="use_importance_sampling_correction=true"):
        async_grpo_train(training)


@pytest.mark.vllm
def test_real_engines_take_new_weights_with_samples_under_way(tmp_path):
    config = on_vllm(async_training(tmp_path, steps=5, age=2, in_flight=True))
    config.policy.generation.max_new_tokens = 48  # long enough to be under way when weights come
    rows, _ = train(config)
    trained = [row for row in rows if "reward_mean" in row]
    assert [row["trajectory_age_max"] for row in trained] == [0, 1, 2, 2, 2]
    assert all(row["grad_norm"] > 0 for row in trained)
    # Of the first step's weights at first, of older ones than the policy's after that.
    assert trained[0]["sampled_prob_error"] < 1e-5
    assert trained[-1]["sampled_prob_error"] > 1e-5
