"""Rollouts: prompts to the engines, and what comes back as a batch to train on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from kvrouter.grpo.data import Problem
from kvrouter.grpo.sequences import SequenceBatch, pad_rows, response_mask
from kvrouter.grpo.tokenizer import TextTokenizer


class Generation(Protocol):
    """What a rollout asks of ``VllmGeneration``."""

    def generate(self, data: dict[str, Any], greedy: bool = False) -> Any:
        """See ``VllmGeneration.generate``."""


@dataclass
class Rollout:
    """B samples: what was generated, and by which weights.

    sampled: [B, W] log-probabilities by the engine, 0 but for the response.
    truncated: [B] bool, ended by its length.
    weight_version: [B], of the weights each was begun with.
    responses: texts.
    prompt_tokens, cached_tokens, generated_tokens: of all samples; cached by the engines' own count.
    """

    batch: SequenceBatch
    sampled: torch.Tensor
    truncated: torch.Tensor
    weight_version: torch.Tensor
    responses: list[str]
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int


def roll_out(
    generation: Generation,
    problems: Sequence[Problem],
    tokenizer: TextTokenizer,
    *,
    seeds: Sequence[int] | None = None,
    greedy: bool = False,
    max_input_tokens: int | None = None,
) -> Rollout:
    """A response to each problem; problems that stand here several times are sampled as often.

    seeds: of the samples' random numbers, one each.  Raises ValueError for a prompt longer than ``max_input_tokens``.
    """
    prompts = [tokenizer.encode(problem.prompt) for problem in problems]
    longest = max(map(len, prompts))
    if max_input_tokens is not None and longest > max_input_tokens:
        raise ValueError(
            f"a prompt has {longest} tokens, and {max_input_tokens} are allowed: set data.max_input_seq_length, or "
            "policy.max_total_sequence_length and policy.generation.max_new_tokens"
        )
    ids, lengths = pad_rows(prompts, tokenizer.pad_id)
    data: dict[str, Any] = {"input_ids": ids, "input_lengths": lengths}
    if seeds is not None:
        data["seeds"] = torch.tensor(seeds)
    result = generation.generate(data, greedy)
    total = result["unpadded_sequence_lengths"]
    width = int(total.max())
    batch = SequenceBatch(result["output_ids"][:, :width], total, response_mask(lengths, total, width))
    return Rollout(
        batch,
        result["logprobs"][:, :width],
        result["truncated"],
        result["weight_version"],
        [
            tokenizer.decode(row[start:end].tolist())
            for row, start, end in zip(batch.ids, lengths.tolist(), total.tolist(), strict=True)
        ],
        int(lengths.sum()),
        int(result["num_cached_tokens"].sum()),
        int(result["generation_lengths"].sum()),
    )


def sample_seeds(seed: int, step: int, count: int) -> list[int]:
    """Seeds of a step's samples, which follow from the training's: where a sample is generated changes nothing."""
    return [int(value) for value in np.random.SeedSequence((seed, step)).generate_state(count) >> 1]
