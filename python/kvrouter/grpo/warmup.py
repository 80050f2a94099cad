"""A short supervised warm-up, so that a model of random weights is right often enough for rewards to tell it more."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvrouter.grpo.data import END_OF_ANSWER, Problem
from kvrouter.grpo.policy import Policy
from kvrouter.grpo.schema import WarmupConfig
from kvrouter.grpo.sequences import SequenceBatch, pad_rows, response_mask
from kvrouter.grpo.tokenizer import TextTokenizer

CHECK_EVERY = 10


def solved_batch(problems: Sequence[Problem], tokenizer: TextTokenizer, ending: Sequence[int]) -> SequenceBatch:
    """Prompts with the right answers behind them, each ended by the tokens ``ending``."""
    prompts = [tokenizer.encode(problem.prompt) for problem in problems]
    answers = [[*tokenizer.encode(problem.answer), *ending] for problem in problems]
    ids, lengths = pad_rows([a + b for a, b in zip(prompts, answers, strict=True)], tokenizer.pad_id)
    return SequenceBatch(ids, lengths, response_mask(torch.tensor([len(p) for p in prompts]), lengths, ids.shape[1]))


def warm_up(
    policy: Policy,
    train: Sequence[Problem],
    validation: Sequence[Problem],
    tokenizer: TextTokenizer,
    config: WarmupConfig,
    seed: int,
) -> tuple[int, float]:
    """Trains on the right answers by AdamW of its own; the reference is frozen by the caller.

    train: of the arithmetic dataset.  The solved examples in its prompts teach, too: the loss is over every answer.
    Returns the number of steps and the share of validation problems whose every token was the likeliest at the end.
    """
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=config.lr)
    random = torch.Generator().manual_seed(seed)
    ending = tokenizer.encode(END_OF_ANSWER)
    (equals,) = tokenizer.encode("=")
    checked = solved_batch(validation, tokenizer, ending)
    step, accuracy = 0, teacher_forced_accuracy(policy, checked)
    while step < config.max_steps and accuracy < config.until_accuracy:
        chosen = torch.randint(len(train), (config.batch_size,), generator=random).tolist()
        batch = solved_batch([train[index] for index in chosen], tokenizer, ending)
        ids = batch.ids.to(policy.device)
        labels = torch.where(answer_mask(ids, equals, ending[-1]), ids, -100)
        attended = torch.arange(ids.shape[1]) < batch.lengths[:, None]
        optimizer.zero_grad(set_to_none=True)
        policy.model(input_ids=ids, attention_mask=attended.long().to(policy.device), labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % CHECK_EVERY == 0 or step == config.max_steps:
            accuracy = teacher_forced_accuracy(policy, checked)
    return step, accuracy


def answer_mask(ids: torch.Tensor, equals: int, end: int) -> torch.Tensor:
    """[B, W], True from behind each ``equals`` to the next ``end``, which is included."""
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    never = torch.full_like(positions, -1)
    # Of the tokens before each: where the last "equals" was, and where the last "end" was.
    before = torch.nn.functional.pad(ids, (1, 0), value=end)[:, :-1]
    last_equals = torch.where(before == equals, positions, never).cummax(-1).values
    last_end = torch.where(before == end, positions, never).cummax(-1).values
    return last_equals > last_end


def teacher_forced_accuracy(policy: Policy, batch: SequenceBatch, rows: int = 32) -> float:
    """Share of sequences whose response's tokens are each the likeliest after the right ones before."""
    right = 0
    with torch.no_grad():
        for start in range(0, len(batch), rows):
            part = batch.rows(start, start + rows)
            likeliest = policy.model(input_ids=part.ids.to(policy.device)).logits[:, :-1].argmax(-1).cpu()
            right += int(((likeliest == part.ids[:, 1:]) | ~part.mask[:, 1:]).all(-1).sum())
    return right / len(batch)
