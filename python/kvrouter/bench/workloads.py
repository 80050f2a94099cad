"""What the benchmark sends: four workloads as deterministic lists of requests with token-id prompts.

The same seed gives the same list, token for token. Prompts that share nothing differ in their very first tokens,
so that no block is shared by accident.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from kvrouter.bench.settings import FIRST_TOKEN_ID, BenchSettings, WorkloadName

TokenArray = npt.NDArray[np.uint32]

#: Share of the fleet's blocks that the prefixes of `Thrash` fill. The rest is room for the requests' own blocks.
THRASH_FILL = (6, 7)


@dataclass(frozen=True, slots=True, eq=False)
class BenchRequest:
    """One request.

    Attributes:
        index: position in the workload, from 0.
        prefix_id: which prefix (or prompt) it shares; requests with the same number can reuse each other's blocks.
        tokens: the prompt, shape ``(prompt_len,)``, dtype uint32.
        max_tokens: tokens to generate, exactly.
        temperature: of sampling; 0 is greedy.
        seed: of sampling.
    """

    index: int
    prefix_id: int
    tokens: TokenArray
    max_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True)
class _Workload:
    """What all workloads have in common.

    Attributes:
        num_requests: requests in the list.
        prompt_len: tokens in each prompt.
        max_tokens: tokens to generate for each.
        vocab_size: token ids are in ``[3, vocab_size)``.
        seed: of everything random.
        temperature: of sampling.
    """

    num_requests: int
    prompt_len: int
    max_tokens: int = 16
    vocab_size: int = 1024
    seed: int = 0
    temperature: float = 0.0

    name: ClassVar[str]

    def __post_init__(self) -> None:
        if self.num_requests < 1:
            raise ValueError(f"num_requests must be at least 1, got {self.num_requests}")
        if self.prompt_len < 1:
            raise ValueError(f"prompt_len must be at least 1, got {self.prompt_len}")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if self.vocab_size < FIRST_TOKEN_ID + 2:
            raise ValueError(f"vocab_size must be at least {FIRST_TOKEN_ID + 2}, got {self.vocab_size}")

    def _request(self, index: int, prefix_id: int, tokens: TokenArray) -> BenchRequest:
        return BenchRequest(index, prefix_id, tokens, self.max_tokens, self.temperature, self.seed + index)

    def _rng(self) -> np.random.Generator:
        # The name is part of the seed: two workloads of one run share no prompt.
        return np.random.default_rng([self.seed, *self.name.encode()])


@dataclass(frozen=True)
class _PrefixedWorkload(_Workload):
    """A workload whose prompts are one of `num_prefixes` shared prefixes and then tokens of their own.

    Attributes:
        num_prefixes: distinct prefixes.
        prefix_len: tokens of each.
    """

    num_prefixes: int = 4
    prefix_len: int = 1536

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_prefixes < 1:
            raise ValueError(f"num_prefixes must be at least 1, got {self.num_prefixes}")
        if not 1 <= self.prefix_len < self.prompt_len:
            raise ValueError(f"prefix_len must be in [1, prompt_len = {self.prompt_len}), got {self.prefix_len}")

    def requests(self) -> list[BenchRequest]:
        """The list: every round asks for each prefix once, in an order of its own.

        That is how an epoch over a shuffled data set looks; a prefix comes back after `num_prefixes` requests on
        average.
        """
        rng = self._rng()
        prefixes = _distinct_rows(rng, self.num_prefixes, self.prefix_len, self.vocab_size)
        tails = _distinct_rows(rng, self.num_requests, self.prompt_len - self.prefix_len, self.vocab_size)
        order = _rounds(rng, self.num_prefixes)
        return [
            self._request(index, prefix_id, np.concatenate([prefixes[prefix_id], tails[index]]))
            for index, prefix_id in zip(range(self.num_requests), order, strict=False)
        ]


@dataclass(frozen=True)
class Shared(_PrefixedWorkload):
    """A few distinct prefixes (system prompts), many requests each. Every worker can hold all of them."""

    name: ClassVar[str] = "shared"


@dataclass(frozen=True)
class Thrash(_PrefixedWorkload):
    """Prefixes that fit the fleet's caches together, but not one worker's.

    Sent everywhere, they push each other out of every cache; each kept at one worker, all of them stay.
    """

    name: ClassVar[str] = "thrash"


@dataclass(frozen=True)
class Group(_Workload):
    """The rollouts of GRPO: `group_size` samples of each prompt, one prompt after the other.

    Attributes:
        group_size: samples of each prompt; they differ in their sampling seed.
    """

    group_size: int = 8
    temperature: float = 1.0
    name: ClassVar[str] = "group"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size < 1:
            raise ValueError(f"group_size must be at least 1, got {self.group_size}")

    def requests(self) -> list[BenchRequest]:
        """The list; the last group is cut where `num_requests` ends."""
        num_prompts = -(-self.num_requests // self.group_size)
        prompts = _distinct_rows(self._rng(), num_prompts, self.prompt_len, self.vocab_size)
        return [
            self._request(index, index // self.group_size, prompts[index // self.group_size])
            for index in range(self.num_requests)
        ]


@dataclass(frozen=True)
class Unique(_Workload):
    """No two prompts share a token from the start on: what routing costs when there is nothing to gain."""

    name: ClassVar[str] = "unique"

    def requests(self) -> list[BenchRequest]:
        """The list, every prompt its own prefix."""
        prompts = _distinct_rows(self._rng(), self.num_requests, self.prompt_len, self.vocab_size)
        return [self._request(index, index, prompts[index]) for index in range(self.num_requests)]


Workload = Shared | Thrash | Group | Unique


def thrash_num_prefixes(num_blocks: int, num_workers: int, block_size: int, prefix_len: int) -> int:
    """How many prefixes fill 6/7 of a fleet's caches.

    With two workers of 448 blocks of 64 tokens and prefixes of 1,536 tokens: 32.

    Raises:
        ValueError: no such number fits the fleet and overflows one worker; names the setting to change.
    """
    prefix_blocks = prefix_len // block_size
    if prefix_blocks < 1:
        raise ValueError(f"prefix_len {prefix_len} is less than a block of {block_size}: nothing could be shared")
    numerator, denominator = THRASH_FILL
    count = num_blocks * num_workers * numerator // (denominator * prefix_blocks)
    if count * prefix_blocks <= num_blocks:
        raise ValueError(
            f"{num_workers} worker(s) of {num_blocks} blocks: no number of prefixes of {prefix_blocks} blocks fits "
            "the fleet but not one worker. thrash needs --num-workers 2 or more, and --num-blocks well above "
            "--prefix-len / --block-size"
        )
    return count


def make_workloads(settings: BenchSettings) -> list[Workload]:
    """The workloads that the settings ask for, in the order in which they are run.

    Raises:
        ValueError: settings that do not fit together.
    """
    wanted = [name for name in WorkloadName if name is not WorkloadName.ALL]
    return [_make(name, settings) for name in wanted if settings.workload in (name, WorkloadName.ALL)]


def _make(name: WorkloadName, settings: BenchSettings) -> Workload:
    base = {
        "prompt_len": settings.seq_len,
        "max_tokens": settings.generation_max_tokens,
        "vocab_size": settings.vocab_size,
        "seed": settings.seed,
    }
    temperature = settings.generation_temperature
    greedy = 0.0 if temperature is None else temperature
    if name is WorkloadName.SHARED:
        return Shared(
            settings.requests_for(96),
            **base,
            temperature=greedy,
            num_prefixes=settings.num_prefixes or 4,
            prefix_len=settings.prefix_len,
        )
    if name is WorkloadName.THRASH:
        num_prefixes = settings.num_prefixes or thrash_num_prefixes(
            settings.num_blocks, settings.num_workers, settings.block_size, settings.prefix_len
        )
        return Thrash(
            settings.requests_for(6 * num_prefixes),
            **base,
            temperature=greedy,
            num_prefixes=num_prefixes,
            prefix_len=settings.prefix_len,
        )
    if name is WorkloadName.GROUP:
        return Group(
            settings.requests_for(12 * settings.group_size),
            **base,
            temperature=1.0 if temperature is None else temperature,
            group_size=settings.group_size,
        )
    return Unique(settings.requests_for(48), **base, temperature=greedy)


def _distinct_rows(rng: np.random.Generator, count: int, length: int, vocab_size: int) -> TokenArray:
    """`count` random rows of `length` tokens, shape ``(count, length)``, no two with the same leading tokens.

    The row's number, in the base of the vocabulary, is written over its first tokens.
    """
    num_ids = vocab_size - FIRST_TOKEN_ID
    rows = rng.integers(FIRST_TOKEN_ID, vocab_size, size=(count, length), dtype=np.uint32)
    numbers = np.arange(count)
    column = 0
    while column == 0 or numbers.any():
        if column >= length:
            raise ValueError(f"{length} token(s) of {num_ids} ids cannot tell {count} prompts apart: make them longer")
        rows[:, column] = FIRST_TOKEN_ID + numbers % num_ids
        numbers //= num_ids
        column += 1
    return rows


def _rounds(rng: np.random.Generator, num_prefixes: int) -> Iterator[int]:
    while True:
        yield from rng.permutation(num_prefixes).tolist()
