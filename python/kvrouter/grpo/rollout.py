"""Rollouts: prompts to the engines, turn by turn, and what comes back as a batch to train on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from kvrouter.grpo.data import Problem
from kvrouter.grpo.environment import Environment
from kvrouter.grpo.sequences import SequenceBatch, pad_rows
from kvrouter.grpo.tokenizer import TextTokenizer

#: From a sample's seed to that of its next turn; seeds are below 2^31.
_SEED_STEP = 0x9E3779B1
_SEED_LIMIT = 1 << 31


class Generation(Protocol):
    """What a rollout asks of ``VllmGeneration``."""

    async def generate_batch(self, data: dict[str, Any], greedy: bool = False) -> Any:
        """See ``VllmGeneration.generate_batch``."""

    def generate_async(self, data: dict[str, Any], greedy: bool = False) -> AsyncIterator[tuple[int, Any]]:
        """See ``VllmGeneration.generate_async``."""


@dataclass(frozen=True)
class Limits:
    """max_input_tokens: of a prompt; a longer first one is an error, a conversation that grows longer ends.

    max_turns: responses of an episode, at most.
    """

    max_input_tokens: int
    max_turns: int = 1


@dataclass
class Episode:
    """One sample: a problem, and the conversation about it.

    tokens, sampled, is_response: of the conversation so far; ``sampled`` are the engine's log-probabilities of
        responses, 0 for what was given.
    weight_version: of the weights that its engine had when its first turn came there.
    workers, overlap_blocks, router_s: of each turn, the worker that served it, the leading blocks that the router
        believed it to hold (None: not the router's choice), and how long the decision took.
    prompt_lengths: tokens of each turn's prompt.
    cached_tokens: summed over its turns, by the engines' own count.
    truncated: a response was ended by its length, or the conversation by ``max_input_tokens``.
    """

    problem: Problem
    tokens: list[int]
    sampled: list[float]
    is_response: list[bool]
    rewards: list[float] = field(default_factory=list)
    correct: list[bool] = field(default_factory=list)
    responses: list[str] = field(default_factory=list)
    workers: list[int] = field(default_factory=list)
    overlap_blocks: list[int | None] = field(default_factory=list)
    router_s: list[float] = field(default_factory=list)
    prompt_lengths: list[int] = field(default_factory=list)
    weight_version: int = 0
    cached_tokens: int = 0
    truncated: bool = False
    over: bool = False

    @property
    def prompt_tokens(self) -> int:
        """Summed over its turns."""
        return sum(self.prompt_lengths)

    @property
    def reward(self) -> float:
        """Mean over the problem's turns; one that was not reached counts 0."""
        return sum(self.rewards) / len(self.problem.answers)

    def add(self, tokens: Sequence[int], sampled: Sequence[float] | None = None) -> None:
        """Appends tokens: of a response, with the engine's log-probabilities, or given."""
        self.tokens += tokens
        self.sampled += [0.0] * len(tokens) if sampled is None else sampled
        self.is_response += [sampled is not None] * len(tokens)


async def roll_out(
    generation: Generation,
    environment: Environment,
    problems: Sequence[Problem],
    tokenizer: TextTokenizer,
    limits: Limits,
    *,
    seeds: Sequence[int] | None = None,
    greedy: bool = False,
) -> list[Episode]:
    """An episode of each problem; problems that stand here several times are sampled as often.

    First turns are generated in one batch, so that the router decides with all of them in view; after that, episodes do
    not wait for each other.
    seeds: of the episodes' random numbers, one each.  Raises ValueError for a prompt longer than
    ``limits.max_input_tokens``.
    """
    episodes = []
    for problem in problems:
        prompt = tokenizer.encode(problem.prompt)
        if len(prompt) > limits.max_input_tokens:
            raise ValueError(f"a prompt has {len(prompt)} tokens, and {limits.max_input_tokens} are allowed")
        episode = Episode(problem.first_turns(limits.max_turns), [], [], [])
        episode.add(prompt)
        episodes.append(episode)
    turns = _Turns(generation, environment, tokenizer, limits, greedy)
    if limits.max_turns == 1:
        result = await generation.generate_batch(turns.requests(episodes, seeds), greedy)
        for row, episode in enumerate(episodes):
            turns.finish(episode, result, row)
        return episodes
    under_way = []
    try:
        answers = generation.generate_async(turns.requests(episodes, seeds), greedy)
        async for index, result in answers:
            seed = None if seeds is None else seeds[index]
            under_way.append(asyncio.ensure_future(turns.converse(episodes[index], result, seed)))
        await asyncio.gather(*under_way)
    finally:
        for conversation in under_way:
            conversation.cancel()
    return episodes


@dataclass(frozen=True)
class _Turns:
    """Takes episodes from turn to turn."""

    generation: Generation
    environment: Environment
    tokenizer: TextTokenizer
    limits: Limits
    greedy: bool

    def requests(self, episodes: Sequence[Episode], seeds: Sequence[int] | None) -> dict[str, Any]:
        """What is generated from: each episode's conversation so far."""
        ids, lengths = pad_rows([episode.tokens for episode in episodes], self.tokenizer.pad_id)
        data: dict[str, Any] = {"input_ids": ids, "input_lengths": lengths}
        if seeds is not None:
            turns = [len(episode.responses) for episode in episodes]
            data["seeds"] = torch.tensor(
                [(seed + turn * _SEED_STEP) % _SEED_LIMIT for seed, turn in zip(seeds, turns, strict=True)]
            )
        return data

    async def converse(self, episode: Episode, result: Any, seed: int | None) -> None:
        """The rest of an episode, from its first response on."""
        self.finish(episode, result, 0)
        while not episode.over:
            seeds = None if seed is None else [seed]
            self.finish(episode, await self.generation.generate_batch(self.requests([episode], seeds), self.greedy), 0)

    def finish(self, episode: Episode, result: Any, row: int) -> None:
        """Ends a turn: takes the response, has it judged, and appends what the environment says."""
        turn = len(episode.responses)
        response = self.tokenizer.decode(_take(episode, result, row))
        feedback = self.environment.respond(episode.problem, turn, response)
        episode.responses.append(response)
        episode.rewards.append(feedback.reward)
        episode.correct.append(feedback.correct)
        episode.over = feedback.observation is None or turn + 1 == len(episode.problem.answers)
        if feedback.observation is None or episode.over:
            return
        tokens = self.tokenizer.encode(feedback.observation)
        if len(episode.tokens) + len(tokens) > self.limits.max_input_tokens:
            episode.over = episode.truncated = True
        else:
            episode.add(tokens)


def _take(episode: Episode, result: Any, row: int) -> list[int]:
    """Appends what was generated, and returns it."""
    start, end = len(episode.tokens), int(result["unpadded_sequence_lengths"][row])
    if not episode.responses:
        episode.weight_version = int(result["weight_version"][row])
    episode.prompt_lengths.append(start)
    episode.cached_tokens += int(result["num_cached_tokens"][row])
    episode.truncated |= bool(result["truncated"][row])
    episode.workers.append(int(result["gen_leader_worker_idx"][row]))
    episode.overlap_blocks.append(result["overlap_blocks"][row])
    episode.router_s.append(float(result["router_s"][row]))
    tokens: list[int] = result["output_ids"][row, start:end].tolist()
    episode.add(tokens, result["logprobs"][row, start:end].tolist())
    return tokens


@dataclass
class Rollout:
    """B episodes as a batch.

    seconds: what they took; of rollouts beside training, the time since the last ones were taken.
    sampled: [B, W] log-probabilities by the engine, 0 but for responses.
    rewards: [B].  truncated: [B] bool.  weight_version: [B].
    """

    episodes: list[Episode]
    batch: SequenceBatch
    sampled: torch.Tensor
    rewards: torch.Tensor
    truncated: torch.Tensor
    weight_version: torch.Tensor
    seconds: float


def as_batch(episodes: Sequence[Episode], pad_id: int, seconds: float) -> Rollout:
    """Episodes, right-padded to the longest."""
    ids, lengths = pad_rows([episode.tokens for episode in episodes], pad_id)
    sampled, mask = torch.zeros(ids.shape), torch.zeros(ids.shape, dtype=torch.bool)
    for row, episode in enumerate(episodes):
        sampled[row, : len(episode.tokens)] = torch.tensor(episode.sampled)
        mask[row, : len(episode.tokens)] = torch.tensor(episode.is_response)
    return Rollout(
        list(episodes),
        SequenceBatch(ids, lengths, mask),
        sampled,
        torch.tensor([episode.reward for episode in episodes]),
        torch.tensor([episode.truncated for episode in episodes]),
        torch.tensor([episode.weight_version for episode in episodes]),
        seconds,
    )


def sample_seeds(seed: int, step: int, count: int) -> list[int]:
    """Seeds of a step's samples, which follow from the training's: where a sample is generated changes nothing."""
    return [int(value) for value in np.random.SeedSequence((seed, step)).generate_state(count) >> 1]
