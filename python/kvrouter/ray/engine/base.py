"""The interface between a generation worker and the engine inside it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

TOPIC = "kv"


class EngineDeadError(RuntimeError):
    """The engine is gone and will answer nothing any more; only a new process helps."""


@dataclass(frozen=True)
class EnginePorts:
    """TCP ports that an engine binds on all interfaces."""

    kv_events: int
    replay: int
    load: int


@dataclass(frozen=True)
class EngineSpec:
    """What an engine is started with.

    config: the generation config (see ``kvrouter.ray.config.GenerationConfig``).
    rank: number of the worker in its group; seeds differ by it, so that workers do not sample the same.
    index_on_host, workers_on_host: which of how many engines of the group it is on its host; without a GPU, they share
        the host's cores by it.
    devices: GPUs of the engine, by CUDA's numbering; empty without.
    """

    config: Mapping[str, Any]
    rank: int
    index_on_host: int = 0
    workers_on_host: int = 1
    devices: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class RoutingNote:
    """What its sender says of how a request came to its worker; for the worker's ledger.

    overlap_blocks: leading blocks that the router believed the worker to hold; None: not the router's choice.
    wait_s: how long the request waited for the decision.
    fallback: the router was asked, and did not answer.
    retries: workers that failed before.
    """

    overlap_blocks: int | None = None
    wait_s: float = 0.0
    fallback: bool = False
    retries: int = 0


@dataclass(slots=True)
class SampleRequest:
    """One sample to generate.

    tokens: prompt, int64, (num_tokens,).
    greedy: take the most likely token whatever the config's temperature.
    max_new_tokens: at most; None: the config's.
    stop_strings: besides the config's.
    seed: of the sampling; None: the engine's own.
    want_text: whether the result's ``text`` is wanted.
    decided_at: when the request's worker was decided, seconds since the epoch; 0: not told.
    decision: how it was.
    """

    tokens: npt.NDArray[np.int64]
    greedy: bool = False
    max_new_tokens: int | None = None
    stop_strings: tuple[str, ...] = ()
    seed: int | None = None
    want_text: bool = False
    decided_at: float = 0.0
    decision: RoutingNote | None = None


@dataclass(slots=True)
class SampleResult:
    """What a worker answers.

    tokens, logprobs: of what was generated: int64 and float32, (num_generated,).
    truncated: ended by its length, not by a stop token.
    cached_tokens: prompt tokens that the engine took from its cache.
    weight_version: of the weights it was generated with (those in use when it began).
    transit_s: from the decision to the arrival here, by the two clocks of the nodes concerned.
    ttft_s, duration_s: from the arrival to the first and the last token.
    """

    tokens: npt.NDArray[np.int64]
    logprobs: npt.NDArray[np.float32]
    truncated: bool
    cached_tokens: int
    text: str | None = None
    weight_version: int = 0
    transit_s: float = 0.0
    ttft_s: float = 0.0
    duration_s: float = 0.0


@dataclass(frozen=True)
class WeightSource:
    """New weights.

    version: grows with each update; what samples are marked with.
    path: a checkpoint folder or file that every worker's node can read; or
    state_dict: name to CPU tensor or array, as the checkpoint of the model names them.
    """

    version: int
    path: str | None = None
    state_dict: Mapping[str, Any] | None = field(default=None, repr=False)


class Engine(ABC):
    """One engine.  All methods are called on one asyncio loop, that of the worker's process."""

    @abstractmethod
    async def start(self) -> None:
        """Starts it and waits until it can generate.  Raises RuntimeError when it cannot."""

    @property
    @abstractmethod
    def block_size(self) -> int:
        """Tokens in a KV block, as the engine really has it."""

    @property
    @abstractmethod
    def max_model_len(self) -> int:
        """Most tokens of a prompt and what follows it."""

    @abstractmethod
    async def generate(self, request: SampleRequest) -> SampleResult:
        """Generates one sample.

        Raises ValueError for a prompt the engine cannot take, EngineDeadError when there is no engine any more.
        Cancelling the call takes the request out of the engine.
        """

    @abstractmethod
    async def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, with the special tokens that the model's tokenizer adds."""

    @abstractmethod
    async def reset_prefix_cache(self, preempt_running: bool) -> bool:
        """Forgets every cached prefix; False while requests hold blocks (unless they are to be preempted)."""

    @abstractmethod
    async def cache_counters(self) -> tuple[int, int]:
        """Prompt tokens looked up in, and taken from, the prefix cache since the start."""

    @abstractmethod
    async def pause(self) -> None:
        """Computes nothing until ``resume``; requests wait."""

    @abstractmethod
    async def resume(self) -> None:
        """Goes on after ``pause``."""

    @abstractmethod
    async def load_weights(self, source: WeightSource) -> None:
        """Replaces the weights.  The prefix cache is left as it is."""

    @abstractmethod
    async def init_collective(self, host: str, port: int, first_rank: int, world_size: int) -> None:
        """Joins the process group that weights are broadcast in; its tensor-parallel ranks come from ``first_rank``."""

    @abstractmethod
    async def receive_weights(self, info: Mapping[str, tuple[Sequence[int], str]]) -> None:
        """Takes part in a broadcast of weights: name to (shape, dtype), in the order in which they are sent."""

    @abstractmethod
    async def sleep(self, level: int) -> None:
        """Gives its GPU memory back."""

    @abstractmethod
    async def wake_up(self, tags: Sequence[str] | None) -> None:
        """Takes its GPU memory again."""

    @abstractmethod
    async def check_health(self) -> None:
        """Raises EngineDeadError when the engine is gone."""

    @abstractmethod
    async def stop(self) -> None:
        """Ends the engine and frees its ports.  May be called again."""
