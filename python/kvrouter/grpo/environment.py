"""The environment: says what a response is worth, and what comes next in a conversation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from kvrouter.grpo.data import Problem
from kvrouter.grpo.schema import ExactAnswerConfig


@dataclass(frozen=True)
class Feedback:
    """What the environment says to a response.

    observation: text that goes behind the response, for the policy to respond to; None: the conversation is over.
    """

    reward: float
    correct: bool
    observation: str | None


class Environment(Protocol):
    """What rollouts ask of an environment."""

    def respond(self, problem: Problem, turn: int, response: str) -> Feedback:
        """Feedback to the response of ``turn`` (from 0)."""


class ExactAnswerEnvironment:
    """A response is right when it is the turn's answer, but for white space around it.

    It then says ``ok``, or what would have been right, before the next question.
    """

    def __init__(self, config: ExactAnswerConfig) -> None:
        if config.correct_reward <= config.wrong_reward:
            raise ValueError(
                f"env.exact_answer.correct_reward ({config.correct_reward}) must be above wrong_reward "
                f"({config.wrong_reward})"
            )
        self._config = config

    def respond(self, problem: Problem, turn: int, response: str) -> Feedback:
        """See ``Environment.respond``."""
        answer = problem.answers[turn]
        correct = response.strip() == answer.strip()
        reward = self._config.correct_reward if correct else self._config.wrong_reward
        if turn + 1 == len(problem.answers):
            return Feedback(reward, correct, None)
        verdict = "ok" if correct else f"no: {answer}"
        return Feedback(reward, correct, f"{verdict}\n{problem.questions[turn + 1]}")
