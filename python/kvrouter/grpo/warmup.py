"""A short supervised warm-up, so that a model of random weights is right often enough for rewards to tell it more."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvrouter.grpo.data import END_OF_ANSWER, Problem
from kvrouter.grpo.environment import Environment
from kvrouter.grpo.policy import Policy
from kvrouter.grpo.schema import WarmupConfig
from kvrouter.grpo.sequences import SequenceBatch, pad_rows
from kvrouter.grpo.tokenizer import TextTokenizer

CHECK_EVERY = 2


def solved_batch(
    problems: Sequence[Problem], environment: Environment, tokenizer: TextTokenizer, ending: Sequence[int]
) -> SequenceBatch:
    """Conversations in which every response is the right answer, ended by the tokens ``ending``."""
    rows, masks = [], []
    for problem in problems:
        tokens: list[int] = []
        is_response: list[bool] = []
        text: str | None = problem.prompt
        for turn, answer in enumerate(problem.answers):
            given, response = tokenizer.encode(text or ""), [*tokenizer.encode(answer), *ending]
            tokens += given + response
            is_response += [False] * len(given) + [True] * len(response)
            text = environment.respond(problem, turn, answer).observation
        rows.append(tokens)
        masks.append(is_response)
    ids, lengths = pad_rows(rows, tokenizer.pad_id)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for row, is_response in enumerate(masks):
        mask[row, : len(is_response)] = torch.tensor(is_response)
    return SequenceBatch(ids, lengths, mask)


def warm_up(
    policy: Policy,
    train: Sequence[Problem],
    validation: Sequence[Problem],
    environment: Environment,
    tokenizer: TextTokenizer,
    config: WarmupConfig,
    seed: int,
) -> tuple[int, float]:
    """Trains on the right answers by AdamW of its own; the reference is frozen by the caller.

    train: of an arithmetic dataset.  The solved examples in its prompts teach, too: the loss is over every answer.
    Returns the number of steps and the share of validation problems whose every response's token was the likeliest.
    """
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=config.lr)
    random = torch.Generator().manual_seed(seed)
    ending = tokenizer.encode(END_OF_ANSWER)
    (equals,) = tokenizer.encode("=")
    checked = solved_batch(validation, environment, tokenizer, ending)
    step, accuracy = 0, teacher_forced_accuracy(policy, checked)
    while step < config.max_steps and accuracy < config.until_accuracy:
        chosen = torch.randint(len(train), (config.batch_size,), generator=random).tolist()
        batch = solved_batch([train[index] for index in chosen], environment, tokenizer, ending)
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
