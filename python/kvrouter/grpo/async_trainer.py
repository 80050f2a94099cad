"""async_grpo_train: rollouts go on beside training, a bounded number of steps ahead of it."""

from __future__ import annotations

import time
from concurrent.futures import Future, wait
from typing import Any

from kvrouter.grpo.checks import check_async
from kvrouter.grpo.rollout import Episode, Rollout, as_batch, roll_out, sample_seeds
from kvrouter.grpo.steps import OnStep, last_step, limits, problems_to_sample, refit, run_steps
from kvrouter.grpo.training import Training
from kvrouter.ray import background


def async_grpo_train(training: Training, on_step: OnStep | None = None) -> list[dict[str, Any]]:
    """``grpo_train`` with rollouts that run ``grpo.async_grpo.max_trajectory_age_steps`` steps ahead of the training.

    Every step trains on the problems that it would train on in ``grpo_train``, sampled from weights that are at most
    so many steps old; which ones is recorded for each sample (``Episode.weight_version``), and the loss corrects for it
    (``loss_fn.use_importance_sampling_correction``, without which this raises ValueError).
    """
    check_async(training.config)
    return run_steps(training, RolloutsAhead(training), on_step)


class RolloutsAhead:
    """Rolls out in the background: all groups of the steps that may be begun with the weights that there are.

    A group (the samples of one prompt) is the unit: its first turns are decided together, and groups do not wait for
    each other.
    """

    def __init__(self, training: Training) -> None:
        self._training = training
        self._settings = training.config.grpo.async_grpo
        self._last = last_step(training)
        self._next = 0  # step to begin next
        self._taken = 0
        self._taken_at = 0.0
        self._groups: dict[int, list[Future[list[Episode]]]] = {}

    def start(self, step: int) -> None:
        """Begins rollouts of this step and of as many after it as may be."""
        self._next = step
        self._taken_at = time.perf_counter()
        self._begin_up_to(step + self._settings.max_trajectory_age_steps)

    def take(self, step: int) -> Rollout:
        """The step's groups in order, when all are done; raises what a rollout was ended by."""
        groups = [group.result() for group in self._groups[step]]
        del self._groups[step]
        self._taken = step
        now, since = time.perf_counter(), self._taken_at
        self._taken_at = now
        return as_batch(
            [episode for group in groups for episode in group], self._training.tokenizer.pad_id, now - since
        )

    def refit(self) -> None:
        """Gives the engines new weights: between two tokens of what is under way, or after it; then goes further ahead.

        Rollouts that are begun from now on have the new weights, so one more step may be begun.
        """
        if not self._settings.in_flight_weight_updates:
            wait(self._under_way())
        refit(self._training, keep_kv_cache=not self._settings.recompute_kv_cache_after_weight_updates)
        self._begin_up_to(self._taken + 1 + self._settings.max_trajectory_age_steps)

    def close(self) -> None:
        """Cancels what is under way."""
        for group in self._under_way():
            group.cancel()
        self._groups.clear()

    def _under_way(self) -> list[Future[list[Episode]]]:
        return [group for groups in self._groups.values() for group in groups if not group.done()]

    def _begin_up_to(self, step: int) -> None:
        for begun in range(self._next, min(step, self._last) + 1):
            self._groups[begun] = self._begin(begun)
        self._next = max(self._next, min(step, self._last) + 1)

    def _begin(self, step: int) -> list[Future[list[Episode]]]:
        training = self._training
        size = training.config.grpo.num_generations_per_prompt
        problems = problems_to_sample(training, step)
        seeds = sample_seeds(training.config.grpo.seed, step, len(problems))
        return [
            background.spawn(
                roll_out(
                    training.generation,
                    training.environment,
                    problems[start : start + size],
                    training.tokenizer,
                    limits(training),
                    seeds=seeds[start : start + size],
                )
            )
            for start in range(0, len(problems), size)
        ]
