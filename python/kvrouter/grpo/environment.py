"""The environment: says what a response is worth."""

from __future__ import annotations

from collections.abc import Sequence

from kvrouter.grpo.data import Problem
from kvrouter.grpo.schema import ExactAnswerConfig


class ExactAnswerEnvironment:
    """A response is right when it is the answer, but for white space around it."""

    def __init__(self, config: ExactAnswerConfig) -> None:
        if config.correct_reward <= config.wrong_reward:
            raise ValueError(
                f"env.exact_answer.correct_reward ({config.correct_reward}) must be above wrong_reward "
                f"({config.wrong_reward})"
            )
        self._config = config

    def correct(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[bool]:
        """Whether each response is right."""
        return [
            response.strip() == problem.answer.strip() for problem, response in zip(problems, responses, strict=True)
        ]

    def rewards(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[float]:
        """The reward of each response."""
        config = self._config
        return [config.correct_reward if right else config.wrong_reward for right in self.correct(problems, responses)]
