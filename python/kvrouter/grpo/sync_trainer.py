"""grpo_train: rollout, learning, refit, one after the other."""

from __future__ import annotations

import time
from typing import Any

from kvrouter.grpo.rollout import Rollout, as_batch, roll_out, sample_seeds
from kvrouter.grpo.steps import OnStep, limits, problems_to_sample, refit, run_steps
from kvrouter.grpo.training import Training
from kvrouter.ray import background


def grpo_train(training: Training, on_step: OnStep | None = None) -> list[dict[str, Any]]:
    """Trains to ``grpo.max_num_steps``; returns the figures of each step, as ``metrics.jsonl`` has them.

    on_step: called with a step's figures when it is over, its weights in the engines.

    The router is started if it does not run, and ended when this returns or raises.  A router that cannot start is no
    error (``Failed to initialize router: <reason>``): training goes on without it.
    """
    return run_steps(training, _OneAfterTheOther(training), on_step)


class _OneAfterTheOther:
    """Rolls out when a step asks for it."""

    def __init__(self, training: Training) -> None:
        self._training = training

    def start(self, step: int) -> None:
        """Nothing runs ahead."""

    def take(self, step: int) -> Rollout:
        """All of the step's samples in one batch, so that the router decides with all of them in view."""
        training = self._training
        began = time.perf_counter()
        problems = problems_to_sample(training, step)
        episodes = background.run(
            roll_out(
                training.generation,
                training.environment,
                problems,
                training.tokenizer,
                limits(training),
                seeds=sample_seeds(training.config.grpo.seed, step, len(problems)),
            )
        )
        return as_batch(episodes, training.tokenizer.pad_id, time.perf_counter() - began)

    def refit(self) -> None:
        """With nothing under way, caches are always emptied."""
        refit(self._training)

    def close(self) -> None:
        """Nothing runs."""
