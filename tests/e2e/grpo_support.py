"""What the tests of GRPO training share."""

from __future__ import annotations

import json
import os
import signal

import pytest
from ray_support import router_cfg, wait_until

torch = pytest.importorskip("torch", reason="torch is not installed: run scripts/install_vllm.py")
pytest.importorskip("transformers", reason="transformers is not installed: run scripts/install_vllm.py")
pytest.importorskip("omegaconf", reason="OmegaConf is not installed: pip install 'kvrouter[grpo]'")

from kvrouter.grpo import async_grpo_train, config_from, grpo_train, setup  # noqa: E402
from kvrouter.grpo.environment import Feedback  # noqa: E402
from kvrouter.grpo.tokenizer import CHARACTER_VOCAB_SIZE  # noqa: E402


def sim_training(folder, *, steps=3, router=None, checkpoints=False, data=None, sim=None, **grpo):
    """A config of two simulated engines and a model as small as can be; prompts of five blocks."""
    data = {"size": 16, "num_prefixes": 2, "num_shots": 50, **(data or {})}
    return config_from(
        {
            "grpo": {
                "num_prompts_per_step": 4,
                "num_generations_per_prompt": 4,
                "max_num_steps": steps,
                "val_period": 0,
                "max_val_samples": 4,
                "router": router_cfg() if router is None else router,
                **grpo,
            },
            "policy": {
                "tiny": {"num_layers": 1},
                "optimizer": {"kwargs": {"lr": 1e-3}},
                "generation": {
                    "engine": "sim",
                    "sim_cfg": {"time_scale": 0.1, "vocab_size": CHARACTER_VOCAB_SIZE, **(sim or {})},
                },
            },
            "data": {"train": data, "validation": {**data, "seed": 1}},
            "logger": {"log_dir": str(folder / "log"), "plots_enabled": False, "rollouts_enabled": True},
            "checkpointing": {"enabled": checkpoints, "checkpoint_dir": str(folder / "checkpoints"), "save_period": 2},
            "cluster": {"gpus_per_node": 2},
        }
    )


def on_vllm(config):
    """The same on real engines."""
    generation = config.policy.generation
    generation.engine = "vllm"
    generation.vllm_cfg = {
        "precision": "float32",
        "enforce_eager": True,
        "env_vars": {"VLLM_CPU_KVCACHE_SPACE": "1"},
    }
    generation.vllm_kwargs = {"num_gpu_blocks_override": 128, "max_num_seqs": 16}
    return config


class EvenCharacters:
    """Rewards that a simulated engine's tokens do earn: the share of characters with an even code."""

    def respond(self, problem, turn, response):
        reward = sum(ord(c) % 2 == 0 for c in response) / 4
        observation = None if turn + 1 == len(problem.answers) else problem.questions[turn + 1]
        return Feedback(reward, False, observation)


def trainer_of(config):
    return async_grpo_train if config.grpo.async_grpo.enabled else grpo_train


def train_and_kill_a_worker(config):
    """``train``, with worker 0 killed after the first step; waits until it serves again, in another process."""
    with setup(config) as training:
        training.environment = EvenCharacters()
        worker_group = training.generation.worker_group
        pid = worker_group.report(0).pid

        def kill(row):
            if row["step"] == 1:
                os.kill(pid, signal.SIGKILL)

        rows = trainer_of(config)(training, kill)
        weights = training.policy.weights()
        wait_until(lambda: worker_group.is_up(0), "worker 0 to serve again")
        assert worker_group.report(0).pid != pid
        return rows, weights


def train(config, on_step=None):
    """Trains; returns the rows and the trained weights."""
    with setup(config) as training:
        training.environment = EvenCharacters()
        rows = trainer_of(config)(training, on_step)
        assert training.generation.router is None
        return rows, training.policy.weights()


def sampled(folder):
    """What was sampled for each prompt: the lines of rollouts.jsonl, without who served them and how."""
    lines = [json.loads(line) for line in (folder / "log" / "rollouts.jsonl").read_text().splitlines()]
    return [(line["step"], line["question"], line["responses"], line["reward"]) for line in lines]


LEARNED = ("reward_mean", "loss", "kl", "grad_norm")


def same_learning(rows, others):
    rows, others = ([row for row in one if "reward_mean" in row] for one in (rows, others))
    assert len(rows) == len(others) > 0
    for row, other in zip(rows, others, strict=True):
        assert [row[name] for name in LEARNED] == pytest.approx([other[name] for name in LEARNED], rel=1e-4, abs=1e-6)


def same_weights(one, other):
    return all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)
