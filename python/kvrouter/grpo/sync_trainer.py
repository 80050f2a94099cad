"""grpo_train: rollout, learning, refit, one after the other."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from kvrouter.grpo.advantages import group_relative_advantages
from kvrouter.grpo.checkpoint import save_checkpoint
from kvrouter.grpo.data import problems_of_step
from kvrouter.grpo.records import TrainingLog
from kvrouter.grpo.rollout import Rollout, roll_out, sample_seeds
from kvrouter.grpo.training import Training
from kvrouter.ray import background

logger = logging.getLogger("kvrouter.grpo")


class _PhaseTimes:
    """Seconds spent in each phase of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[f"{phase}_s"] = self.seconds.get(f"{phase}_s", 0.0) + time.perf_counter() - began


def grpo_train(training: Training, on_step: Callable[[dict[str, Any]], None] | None = None) -> list[dict[str, Any]]:
    """Trains to ``grpo.max_num_steps``; returns the figures of each step, as ``metrics.jsonl`` has them.

    on_step: called with a step's figures when it is over, its weights in the engines.

    The router is started if it does not run, and ended when this returns or raises.  A router that cannot start is no
    error (``Failed to initialize router: <reason>``): training goes on without it.
    """
    config = training.config
    log = TrainingLog(config, training.first_step)
    try:
        training.generation.prepare_for_generation()
        refit(training)
        last = config.grpo.max_num_steps
        if config.grpo.val_at_start and training.first_step == 0:
            log.step({"step": 0, "validation_accuracy": validate(training)})
        for step in range(training.first_step + 1, last + 1):
            row = train_step(training, step)
            if _due(step, config.grpo.val_period) or (step == last and config.grpo.val_at_end):
                row["validation_accuracy"] = validate(training)
            # The row comes first: a resume drops rows of steps after its checkpoint, and does these again.
            log.step(row)
            if config.checkpointing.enabled and (step == last or _due(step, config.checkpointing.save_period)):
                save_checkpoint(
                    config.checkpointing.checkpoint_dir,
                    step,
                    {"policy": training.policy.state()},
                    config.checkpointing.keep_top_k,
                )
            if on_step is not None:
                on_step(row)
        return log.rows
    finally:
        background.run(training.generation.stop_router())
        log.close()


def _due(step: int, period: int) -> bool:
    return period > 0 and step % period == 0


def train_step(training: Training, step: int) -> dict[str, Any]:
    """Step 1, 2, ...: a rollout, an update of the policy, its weights to the engines; returns the figures."""
    grpo, policy = training.config.grpo, training.policy
    timed = _PhaseTimes()
    training.generation.router_metrics(clear=True)  # validation's requests are not the step's
    unique = problems_of_step(
        training.train, step - 1, grpo.num_prompts_per_step, training.config.data.shuffle, grpo.seed
    )
    problems = [problem for problem in unique for _ in range(grpo.num_generations_per_prompt)]
    with timed("generation"):
        rollout = roll_out(
            training.generation,
            problems,
            training.tokenizer,
            seeds=sample_seeds(grpo.seed, step, len(problems)),
            max_input_tokens=_max_input_tokens(training),
        )
    router = training.generation.get_step_metrics()
    rewards = torch.tensor(training.environment.rewards(problems, rollout.responses))
    advantages = group_relative_advantages(
        rewards,
        grpo.num_generations_per_prompt,
        leave_one_out=grpo.use_leave_one_out_baseline,
        normalize=grpo.normalize_rewards,
        clip_low=grpo.advantage_clip_low,
        clip_high=grpo.advantage_clip_high,
    )
    if grpo.overlong_filtering:
        rollout.batch.mask = rollout.batch.mask & ~rollout.truncated[:, None]
    with timed("logprobs"):
        previous = policy.logprobs(rollout.batch)
        reference = policy.logprobs(rollout.batch, reference=True)
    with timed("train"):
        learned = policy.train(rollout.batch, advantages, previous, reference, rollout.sampled, training.config.loss_fn)
    with timed("refit"):
        refit(training)
    return {
        "step": step,
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std()) if len(rewards) > 1 else 0.0,
        **learned,
        **_rollout_figures(rollout, previous, timed.seconds["generation_s"]),
        "router_us_p99": router.get("router/decision_us_p99"),
        **timed.seconds,
        "step_s": sum(timed.seconds.values()),
        **router,
    }


def _max_input_tokens(training: Training) -> int:
    policy = training.config.policy
    room = policy.max_total_sequence_length - policy.generation.max_new_tokens
    limit = training.config.data.max_input_seq_length
    return room if limit is None else min(room, limit)


def _rollout_figures(rollout: Rollout, previous: torch.Tensor, seconds: float) -> dict[str, Any]:
    """Figures of a rollout; ``sampled_prob_error``: mean of |p(engine) - p(policy)| over the responses' tokens."""
    mask = rollout.batch.mask
    error = (rollout.sampled.exp() - previous.exp()).abs()[mask]
    return {
        "tokens_per_s": (rollout.prompt_tokens + rollout.generated_tokens) / seconds,
        "generated_tokens": rollout.generated_tokens,
        "hit_rate": rollout.cached_tokens / rollout.prompt_tokens,
        "truncated": float(rollout.truncated.float().mean()),
        "sampled_prob_error": float(error.mean()) if len(error) else 0.0,
        "weight_version": int(rollout.weight_version.min()),
    }


def refit(training: Training) -> None:
    """Gives the engines the policy's weights; caches and the router's index are emptied before this returns."""
    if not training.generation.update_weights(training.policy.weights()):
        logger.warning("a worker did not take the new weights: it gets them before it serves again")


def validate(training: Training) -> float:
    """Share of the validation problems that the most likely response solves."""
    problems = training.validation[: training.config.grpo.max_val_samples]
    rollout = roll_out(
        training.generation,
        problems,
        training.tokenizer,
        greedy=True,
        max_input_tokens=_max_input_tokens(training),
    )
    right = training.environment.correct(problems, rollout.responses)
    return sum(right) / len(right)
