"""Problems to train on: generated sums behind few-shot prompts, or a JSONL file of one's own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvrouter.grpo.schema import DatasetConfig

#: What ends an answer of the arithmetic dataset, in the few-shot examples as in the response.
END_OF_ANSWER = "\n"


@dataclass(frozen=True)
class Problem:
    """A prompt, and the answer that is right."""

    prompt: str
    answer: str


def load_dataset(config: DatasetConfig, where: str) -> list[Problem]:
    """The problems of a dataset; ``where`` is the config's place, for errors.

    Raises ValueError, naming the key or the line, for settings or a file that do not fit.
    """
    if config.dataset_name == "jsonl":
        if config.data_path is None:
            raise ValueError(f"{where}.dataset_name is 'jsonl': set {where}.data_path to the file")
        return _read_jsonl(Path(config.data_path), config.input_key, config.output_key)
    for key, least in (("size", 1), ("num_prefixes", 1), ("num_shots", 0), ("max_operand", 1), ("seed", 0)):
        if getattr(config, key) < least:
            raise ValueError(f"{where}.{key} must be at least {least}, got {getattr(config, key)}")
    random = np.random.default_rng(config.seed)
    prefixes = ["".join(_solved(random, config.max_operand, config.num_shots)) for _ in range(config.num_prefixes)]
    problems = []
    for index in range(config.size):
        a, b = random.integers(0, config.max_operand + 1, 2).tolist()
        problems.append(Problem(f"{prefixes[index % len(prefixes)]}{a}+{b}=", str(a + b)))
    return problems


def _solved(random: np.random.Generator, max_operand: int, count: int) -> list[str]:
    return [f"{a}+{b}={a + b}{END_OF_ANSWER}" for a, b in random.integers(0, max_operand + 1, (count, 2)).tolist()]


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
        for key in (input_key, output_key):
            if not isinstance(row, dict) or not isinstance(row.get(key), str) or not row[key]:
                raise ValueError(f"{path}:{number} must be an object whose {key!r} is a text")
        problems.append(Problem(row[input_key], row[output_key]))
    if not problems:
        raise ValueError(f"the dataset {path} is empty")
    return problems


def problems_of_step(problems: Sequence[Problem], step: int, count: int, shuffle: bool, seed: int) -> list[Problem]:
    """``count`` problems of step 0, 1, ...: all problems once an epoch, in an order that seed and epoch determine.

    It follows from its arguments alone, so that a resumed training goes on where it was.
    """
    chosen = []
    for position in range(step * count, (step + 1) * count):
        epoch, index = divmod(position, len(problems))
        if shuffle:
            index = int(np.random.default_rng((seed, epoch)).permutation(len(problems))[index])
        chosen.append(problems[index])
    return chosen
