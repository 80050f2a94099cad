"""Requests of a steady load: prompts that share prefixes, conversations that go on, and what their answers must be."""

from __future__ import annotations

import random
from dataclasses import dataclass

from kvrouter.sim import SimEngine

_VOCABULARY = range(3, 1024)
_CONVERSATIONS_KEPT = 64


@dataclass(frozen=True)
class ChaosRequest:
    """One completion request; ``number`` is its own."""

    number: int
    tokens: list[int]
    max_tokens: int
    stream: bool

    def body(self, model: str) -> dict[str, object]:
        """As the OpenAI API takes it."""
        return {
            "model": model,
            "prompt": self.tokens,
            "max_tokens": self.max_tokens,
            "stream": self.stream,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }


class Workload:
    """Draws requests from a seed."""

    def __init__(self, seed: int, block_size: int, families: int, max_tokens: int = 12) -> None:
        self._rng = random.Random(seed)
        self._block_size = block_size
        self._max_tokens = max_tokens
        self._prefixes = [self._words(self._rng.randrange(2, 13) * block_size) for _ in range(families)]
        self._conversations: list[list[int]] = []
        self._longest = 24 * block_size
        self.drawn = 0

    def next(self) -> ChaosRequest:
        """The next request."""
        rng = self._rng
        if self._conversations and rng.random() < 0.3:
            start = rng.choice(self._conversations)
        else:
            prefix = rng.choice(self._prefixes)
            start = prefix[: rng.choice([len(prefix), len(prefix), rng.randrange(1, len(prefix) + 1)])]
        tokens = (start + self._words(rng.choice([0, 1, 5, self._block_size, 3 * self._block_size])))[: self._longest]
        self.drawn += 1
        return ChaosRequest(self.drawn, tokens, rng.randrange(1, self._max_tokens + 1), rng.random() < 0.6)

    def answered(self, request: ChaosRequest, output: list[int]) -> None:
        """Some conversations go on from their answer."""
        if len(self._conversations) >= _CONVERSATIONS_KEPT:
            self._conversations.pop(self._rng.randrange(_CONVERSATIONS_KEPT))
        self._conversations.append(request.tokens + output)

    def _words(self, count: int) -> list[int]:
        return [self._rng.choice(_VOCABULARY) for _ in range(count)]


class ExpectedOutput:
    """What every simulated worker generates for a request: its tokens depend on the prompt and their position alone."""

    def __init__(self) -> None:
        self._engine = SimEngine(num_blocks=512, block_size=16, max_model_len=4096)

    def of(self, request: ChaosRequest) -> list[int]:
        """The tokens."""
        number = self._engine.add(request.tokens, request.max_tokens)
        output: list[int] = []
        while self._engine.has_work:
            output += [token for n, token in self._engine.step()["tokens"].items() if n == number]
        return output
