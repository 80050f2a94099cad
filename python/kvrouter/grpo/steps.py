"""The loop that both trainers share: rollouts in, learning, new weights out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch

from kvrouter.grpo.advantages import group_relative_advantages
from kvrouter.grpo.checkpoint import save_checkpoint
from kvrouter.grpo.data import Problem, problems_of_step
from kvrouter.grpo.records import TrainingLog
from kvrouter.grpo.rollout import Limits, Rollout, roll_out
from kvrouter.grpo.training import Training, checkpoint_folder, fingerprint, max_input_tokens
from kvrouter.prediction import expected_cached_tokens
from kvrouter.ray import background

logger = logging.getLogger("kvrouter.grpo")

OnStep = Callable[[dict[str, Any]], None]


class RolloutSource(Protocol):
    """Where a trainer's rollouts come from."""

    def start(self, step: int) -> None:
        """The engines have weights; rollouts of ``step`` and later ones are wanted."""

    def take(self, step: int) -> Rollout:
        """The rollout of a step; waits for it."""

    def refit(self) -> None:
        """Gives the engines the policy's weights."""

    def close(self) -> None:
        """No more rollouts are wanted; those under way end."""


class PhaseTimes:
    """Seconds spent in each phase of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Counts what runs in this context as ``phase``."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[f"{phase}_s"] = self.seconds.get(f"{phase}_s", 0.0) + time.perf_counter() - began


def run_steps(training: Training, source: RolloutSource, on_step: OnStep | None = None) -> list[dict[str, Any]]:
    """Trains to the last step; returns the figures of each, as ``metrics.jsonl`` has them.

    on_step: called with a step's figures when it is over, its weights in the engines.
    The router is started if it does not run, and ended when this returns or raises.
    """
    config = training.config
    log = None
    try:
        log = TrainingLog(config, training.first_step)
        training.generation.prepare_for_generation()
        refit(training)
        training.first_version = training.generation.weight_version
        last = last_step(training)
        if config.grpo.val_at_start and training.first_step == 0:
            log.step({"step": 0, "validation_accuracy": validate(training)})
        source.start(training.first_step + 1)
        for step in range(training.first_step + 1, last + 1):
            row = _train_step(training, source, step, log)
            if _due(step, config.grpo.val_period) or (step == last and config.grpo.val_at_end):
                row["validation_accuracy"] = validate(training)
            # The row comes first: a resume drops rows of steps after its checkpoint, and does these again.
            log.step(row)
            if config.checkpointing.enabled and (step == last or _due(step, config.checkpointing.save_period)):
                save_checkpoint(
                    checkpoint_folder(config),
                    step,
                    {"policy": training.policy.state(), "of": fingerprint(config)},
                    config.checkpointing.keep_top_k,
                )
            if on_step is not None:
                on_step(row)
        return log.rows
    finally:
        try:
            source.close()
        finally:
            background.run(training.generation.stop_router())
            if log is not None:
                log.close()


def last_step(training: Training) -> int:
    """The step that ends the training."""
    grpo = training.config.grpo
    if grpo.max_num_epochs is None:
        return grpo.max_num_steps
    return min(grpo.max_num_steps, grpo.max_num_epochs * len(training.train) // grpo.num_prompts_per_step)


def _due(step: int, period: int) -> bool:
    return period > 0 and step % period == 0


def _train_step(training: Training, source: RolloutSource, step: int, log: TrainingLog) -> dict[str, Any]:
    timed = PhaseTimes()
    grpo, policy = training.config.grpo, training.policy
    with timed("generation"):
        rollout = source.take(step)
    # Which steps' weights each sample was begun with: those behind step 0, 1, ...
    rollout.weight_version += training.first_step - training.first_version
    router = {**training.generation.get_step_metrics(), **router_figures(rollout, training)}
    advantages = group_relative_advantages(
        rollout.rewards,
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
        source.refit()
    log.rollout(step, rollout, advantages)
    age = step - 1 - rollout.weight_version
    return {
        "step": step,
        "reward_mean": float(rollout.rewards.mean()),
        "reward_std": float(rollout.rewards.std()) if len(rollout.rewards) > 1 else 0.0,
        **learned,
        **_rollout_figures(rollout, previous),
        "weight_version": int(rollout.weight_version.min()),
        "trajectory_age_mean": float(age.float().mean()),
        "trajectory_age_max": int(age.max()),
        "router_us_p99": router.get("router/decision_us_p99"),
        **timed.seconds,
        "step_s": sum(timed.seconds.values()),
        **router,
    }


def _rollout_figures(rollout: Rollout, previous: torch.Tensor) -> dict[str, Any]:
    """Figures of a rollout; ``sampled_prob_error``: mean of |p(engine) - p(policy)| over the responses' tokens."""
    mask = rollout.batch.mask
    error = (rollout.sampled.exp() - previous.exp()).abs()[mask]
    prompt_tokens = sum(episode.prompt_tokens for episode in rollout.episodes)
    cached_tokens = sum(episode.cached_tokens for episode in rollout.episodes)
    generated = sum(sum(episode.is_response) for episode in rollout.episodes)
    return {
        "tokens_per_s": (prompt_tokens + generated) / rollout.seconds,
        "prompt_tokens": prompt_tokens,
        "generated_tokens": generated,
        "turns_mean": sum(len(episode.responses) for episode in rollout.episodes) / len(rollout.episodes),
        "hit_rate": cached_tokens / prompt_tokens,
        "truncated": float(rollout.truncated.float().mean()),
        "sampled_prob_error": float(error.mean()) if len(error) else 0.0,
    }


def router_figures(rollout: Rollout, training: Training) -> dict[str, float]:
    """The router's part in a rollout; nothing where it had none.

    ``router/decisions``: turns that it chose the worker of; ``router/decision_us_p50`` and ``_p99``: how long these
    waited for it, microseconds; ``router/predicted_hit_rate``: share of their prompts that it believed to be cached.
    """
    block_size = training.generation.worker_group.block_size
    waits, expected, tokens = [], 0, 0
    for episode in rollout.episodes:
        for length, overlap, wait_s in zip(
            episode.prompt_lengths, episode.overlap_blocks, episode.router_s, strict=True
        ):
            if overlap is not None:
                waits.append(wait_s * 1e6)
                tokens += length
                expected += expected_cached_tokens(overlap, length, block_size)
    if not waits:
        return {"router/decisions": 0.0}
    p50, p99 = np.percentile(waits, (50, 99)).tolist()
    return {
        "router/decisions": float(len(waits)),
        "router/decision_us_p50": p50,
        "router/decision_us_p99": p99,
        "router/predicted_hit_rate": expected / tokens,
    }


# --- what both sources of rollouts need ---


def limits(training: Training) -> Limits:
    """Of an episode, as the config has them."""
    return Limits(max_input_tokens(training.config), training.config.grpo.max_rollout_turns)


def problems_to_sample(training: Training, step: int) -> list[Problem]:
    """The problems of a step (from 1), each as often as it is to be sampled: groups, one after the other."""
    config = training.config
    unique = problems_of_step(
        training.train, step - 1, config.grpo.num_prompts_per_step, config.data.shuffle, config.grpo.seed
    )
    return [problem for problem in unique for _ in range(config.grpo.num_generations_per_prompt)]


def refit(training: Training, keep_kv_cache: bool = False) -> None:
    """Gives the engines the policy's weights.

    Prefix caches and the router's index are emptied before this returns, or kept with ``keep_kv_cache``.
    """
    if not training.generation.update_weights(training.policy.weights(), keep_kv_cache=keep_kv_cache):
        logger.warning(
            "a worker did not take the new weights, or did not empty its cache: if it is lost, it gets them before it "
            "serves again; else see its log"
        )


def validate(training: Training) -> float:
    """Share of the validation questions that the most likely response answers."""
    grpo = training.config.grpo
    problems = training.validation[: grpo.max_val_samples]
    size = grpo.val_batch_size or len(problems)
    right: list[bool] = []
    asked = 0
    for start in range(0, len(problems), size):
        episodes = background.run(
            roll_out(
                training.generation,
                training.environment,
                problems[start : start + size],
                training.tokenizer,
                limits(training),
                greedy=True,
            )
        )
        asked += sum(len(episode.problem.answers) for episode in episodes)
        right += [correct for episode in episodes for correct in episode.correct]
        for episode in episodes[: max(0, training.config.logger.num_val_samples_to_print - start)]:
            logger.info("...%s -> %s", episode.problem.questions[-1][-20:], episode.responses)
    training.generation.get_step_metrics()  # of the requests here, which are no step's
    return sum(right) / asked
