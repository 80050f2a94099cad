"""Problems to train on: generated sums behind few-shot prompts, alone or in conversations, or a JSONL file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvrouter.grpo.schema import DatasetConfig

#: What ends an answer of the arithmetic datasets, in the few-shot examples as in the response.
END_OF_ANSWER = "\n"


@dataclass(frozen=True)
class Problem:
    """A question, and the answer that is right; several of each are a conversation, asked one after the other."""

    questions: tuple[str, ...]
    answers: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """What a conversation begins with."""
        return self.questions[0]

    def first_turns(self, count: int) -> Problem:
        """The conversation's beginning."""
        return Problem(self.questions[:count], self.answers[:count])


def load_dataset(config: DatasetConfig, where: str) -> list[Problem]:
    """The problems of a dataset; ``where`` is the config's place, for errors.

    Raises ValueError, naming the key or the line, for settings or a file that do not fit.
    """
    if config.dataset_name == "jsonl":
        if config.data_path is None:
            raise ValueError(f"{where}.dataset_name is 'jsonl': set {where}.data_path to the file")
        return _read_jsonl(Path(config.data_path), config.input_key, config.output_key)
    for key, least in (
        ("size", 1),
        ("num_prefixes", 1),
        ("num_shots", 0),
        ("max_operand", 1),
        ("num_turns", 1),
        ("min_turns", 1),
        ("num_shots_per_turn", 0),
        ("seed", 0),
    ):
        if getattr(config, key) < least:
            raise ValueError(f"{where}.{key} must be at least {least}, got {getattr(config, key)}")
    if config.min_turns > config.num_turns:
        raise ValueError(f"{where}.min_turns ({config.min_turns}) must not be above num_turns ({config.num_turns})")
    random = np.random.default_rng(config.seed)
    prefixes = [_solved(random, config.max_operand, config.num_shots) for _ in range(config.num_prefixes)]
    in_turns = config.dataset_name == "arithmetic_turns"
    problems = []
    for index in range(config.size):
        questions, answers = [], []
        for turn in range(int(random.integers(config.min_turns, config.num_turns + 1)) if in_turns else 1):
            shown = (
                _solved(random, config.max_operand, config.num_shots_per_turn)
                if turn
                else prefixes[index % len(prefixes)]
            )
            a, b = random.integers(0, config.max_operand + 1, 2).tolist()
            questions.append(f"{shown}{a}+{b}=")
            answers.append(str(a + b))
        problems.append(Problem(tuple(questions), tuple(answers)))
    return problems


def _solved(random: np.random.Generator, max_operand: int, count: int) -> str:
    pairs = random.integers(0, max_operand + 1, (count, 2)).tolist()
    return "".join(f"{a}+{b}={a + b}{END_OF_ANSWER}" for a, b in pairs)


def _read_jsonl(path: Path, input_key: str, output_key: str) -> list[Problem]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the dataset {path} cannot be read: {error}") from None
    problems = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number} is not JSON: {error}") from None
        questions, answers = (_texts(row, key, f"{path}:{number}") for key in (input_key, output_key))
        if len(questions) != len(answers):
            raise ValueError(f"{path}:{number} has {len(questions)} {input_key!r} and {len(answers)} {output_key!r}")
        problems.append(Problem(questions, answers))
    if not problems:
        raise ValueError(f"the dataset {path} is empty")
    return problems


def _texts(row: object, key: str, where: str) -> tuple[str, ...]:
    value = row.get(key) if isinstance(row, dict) else None
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"{where} must be an object whose {key!r} is a text, or a list of texts: one a turn")
    return tuple(texts)


def problems_of_step(problems: Sequence[Problem], step: int, count: int, shuffle: bool, seed: int) -> list[Problem]:
    """``count`` problems of step 0, 1, ...: all problems once an epoch, in an order that seed and epoch determine.

    It follows from its arguments alone, so that a resumed training goes on where it was.
    """
    orders: dict[int, list[int]] = {}
    chosen = []
    for position in range(step * count, (step + 1) * count):
        epoch, index = divmod(position, len(problems))
        if shuffle:
            if epoch not in orders:
                orders[epoch] = np.random.default_rng((seed, epoch)).permutation(len(problems)).tolist()
            index = orders[epoch][index]
        chosen.append(problems[index])
    return chosen
