"""Conversations: they grow by turns, routing changes nothing but where, and later turns find their prefix cached."""

from __future__ import annotations

import json

import pytest

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'kvrouter[ray]'")

from grpo_support import same_learning, same_weights, sampled, sim_training, train  # noqa: E402

pytestmark = pytest.mark.usefixtures("ray_node")


def conversations(folder, **changes):
    """Three turns that share nothing but a conversation's own past, on caches that hold half of all of them.

    A prompt has some 5 blocks of 64 tokens at first and 9 at the end; there are 32 conversations.
    """
    config = sim_training(
        folder,
        data={
            "dataset_name": "arithmetic_turns",
            "min_turns": 3,
            "num_turns": 3,
            "num_prefixes": 32,
            "size": 32,
            "num_shots_per_turn": 20,
        },
        sim={"num_blocks": 160},
        steps=2,
        num_prompts_per_step=16,
        num_generations_per_prompt=2,
        max_rollout_turns=3,
        **changes,
    )
    config.policy.max_total_sequence_length = 1024
    config.policy.tiny.max_position_embeddings = 1024
    return config


def test_routing_changes_where_and_nothing_else(tmp_path):
    routed, weights = train(conversations(tmp_path / "on"))
    in_turn, same = train(conversations(tmp_path / "off", router={"enabled": False}))
    same_learning(routed, in_turn)
    assert same_weights(weights, same)
    assert sampled(tmp_path / "on") == sampled(tmp_path / "off")
    lines = [json.loads(line) for line in (tmp_path / "on" / "log" / "rollouts.jsonl").read_text().splitlines()]
    assert all(len(line["responses"]) == len(line["workers"]) == 3 for line in lines)
    assert routed[-1]["turns_mean"] == 3
    # A conversation stays where it is cached.
    stayed = [line["workers"][0] == line["workers"][1] == line["workers"][2] for line in lines]
    assert sum(stayed) > len(stayed) / 2
    hits = {name: rows[-1]["hit_rate"] for name, rows in (("on", routed), ("off", in_turn))}
    assert hits["on"] > hits["off"]


def test_turns_beyond_the_limit_are_not_asked(tmp_path):
    config = conversations(tmp_path)
    config.grpo.max_rollout_turns = 2
    config.grpo.max_num_steps = 1
    rows, _ = train(config)
    assert rows[-1]["turns_mean"] == 2


def test_a_conversation_that_grows_too_long_ends(tmp_path):
    config = conversations(tmp_path)
    config.grpo.max_num_steps = 1
    config.data.max_input_seq_length = 480  # room for the second turn, not for the third
    rows, _ = train(config)
    assert rows[-1]["turns_mean"] == 2
    assert rows[-1]["truncated"] == 1.0
