"""What the fleet simulator serves: deterministic lists of requests, of a size that fits the fleet.

A prompt is a list of segments, each a run of tokens drawn from a seed: equal seeds are equal tokens.  Sizes are in
tokens, times in seconds.  The same seed gives the same list.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

TRACE_BLOCK = 512  # tokens that one hash id of a trace stands for


@dataclass
class RequestList:
    """Requests, column by column, as ``_core.simulate_fleet`` takes them."""

    name: str
    users: int = 0
    """Clients that send the list in order, one request each at a time; 0: requests come at their arrival times."""
    num_blocks: int | None = None
    """KV blocks of each worker that the workload is made for; None: the profile's."""
    arrival: list[float] = field(default_factory=list)
    follows: list[int] = field(default_factory=list)
    output_tokens: list[int] = field(default_factory=list)
    expected_output: list[float] = field(default_factory=list)
    first_segment: list[int] = field(default_factory=lambda: [0])
    segment_seed: list[int] = field(default_factory=list)
    segment_length: list[int] = field(default_factory=list)

    def add(
        self,
        segments: Iterable[tuple[int, int]],
        output_tokens: int,
        arrival: float = 0.0,
        follows: int = -1,
        expected_output: float = 0.0,
    ) -> int:
        """One more request; returns its index.  Segments are (seed, length)."""
        for seed, length in segments:
            self.segment_seed.append(seed & (2**64 - 1))
            self.segment_length.append(length)
        self.first_segment.append(len(self.segment_seed))
        self.arrival.append(arrival)
        self.follows.append(follows)
        self.output_tokens.append(output_tokens)
        self.expected_output.append(expected_output)
        return len(self.arrival) - 1

    def columns(self) -> dict[str, Any]:
        """The columns as arrays."""
        return {
            "arrival": np.array(self.arrival, np.float64),
            "follows": np.array(self.follows, np.int64),
            "output_tokens": np.array(self.output_tokens, np.int32),
            "expected_output": np.array(self.expected_output, np.float64),
            "first_segment": np.array(self.first_segment, np.int64),
            "segment_seed": np.array(self.segment_seed, np.uint64),
            "segment_length": np.array(self.segment_length, np.int32),
        }

    def __len__(self) -> int:
        return len(self.arrival)


def _lognormal(rng: np.random.Generator, median: float, sigma: float, low: int, high: int, size: int) -> Any:
    return np.clip(rng.lognormal(np.log(median), sigma, size), low, high).astype(int)


class _Seeds:
    """Seeds of segments that are shared with nobody but by intent."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._next = int(rng.integers(2**62))

    def __call__(self) -> int:
        self._next += 1
        return self._next


def grpo(num_workers: int, rng: np.random.Generator, scale: float) -> RequestList:
    """A rollout step of GRPO: 4 prompts a worker, 16 samples each, all at once; outputs of long-tailed length.

    Lengths are lognormal, part of the spread common to a prompt's samples (hard prompts have long answers), and cut at
    2,048 tokens.
    """
    return _grpo("grpo", num_workers, rng, scale, prompt=2000, most=2048)


def grpo_long_tail(num_workers: int, rng: np.random.Generator, scale: float) -> RequestList:
    """The same with prompts of a quarter of that length and outputs of up to 8,192 tokens: the tail decides."""
    return _grpo("grpo_long_tail", num_workers, rng, scale, prompt=500, most=8192)


def _grpo(name: str, num_workers: int, rng: np.random.Generator, scale: float, prompt: int, most: int) -> RequestList:
    requests = RequestList(name)
    seeds = _Seeds(rng)
    prompts = max(1, round(4 * num_workers * scale))
    lengths = _lognormal(rng, prompt, 0.5, 128, 4 * prompt, prompts)
    medians = rng.lognormal(np.log(350), 0.5, prompts)
    for length, median in zip(lengths, medians, strict=True):
        seed = seeds()
        for output in _lognormal(rng, median, 0.7, 8, most, 16):
            requests.add([(seed, int(length))], int(output))
    return requests


def grpo_agent(num_workers: int, rng: np.random.Generator, scale: float) -> RequestList:
    """GRPO with tools: 2 tasks a worker, 8 samples each, 2 to 8 turns; each turn's result makes the context grow."""
    requests = RequestList("grpo_agent")
    seeds = _Seeds(rng)
    system = seeds()
    for _ in range(max(1, round(2 * num_workers * scale))):
        task, length = seeds(), int(rng.integers(500, 3000))
        turns = int(rng.integers(2, 7))
        for _ in range(8):
            outputs = _lognormal(rng, 120, 0.8, 8, 1500, turns + 2)
            before = requests.add([(system, 1024), (task, length)], int(outputs[0]))
            for turn in range(1, turns + int(rng.integers(0, 3))):
                result = int(rng.lognormal(np.log(600), 0.8))
                before = requests.add(
                    [(seeds(), min(result, 3000) + 1)],
                    int(outputs[turn]),
                    arrival=float(rng.exponential(1.0)),
                    follows=before,
                )
    return requests


def _open_loop(num_workers: int, scale: float) -> int:
    """Requests of an open-loop run: enough for a 99th percentile on a small fleet too."""
    return max(1, round(max(60 * num_workers, 600) * scale))


def _poisson(rng: np.random.Generator, rate: float, count: int) -> Any:
    return np.cumsum(rng.exponential(1 / rate, count))


def hot_spot(num_workers: int, rng: np.random.Generator, scale: float) -> RequestList:
    """Open loop: 70% of the requests share one prefix of 4,096 tokens, the others one of many by a Zipf law."""
    requests = RequestList("hot_spot")
    seeds = _Seeds(rng)
    count = _open_loop(num_workers, scale)
    prefixes = [seeds() for _ in range(1 + 4 * num_workers)]
    weights = 1 / np.arange(1, 4 * num_workers + 1)
    weights /= weights.sum()
    outputs = _lognormal(rng, 150, 0.6, 8, 1000, count)
    for arrival, output in zip(_poisson(rng, 14 * num_workers, count), outputs, strict=True):
        which = 0 if rng.random() < 0.7 else 1 + int(rng.choice(4 * num_workers, p=weights))
        tail = int(rng.integers(64, 512))
        requests.add([(prefixes[which], 4096), (seeds(), tail)], int(output), float(arrival))
    return requests


def few_shot(num_workers: int, rng: np.random.Generator, scale: float) -> RequestList:
    """An evaluation, all at once: tasks of a few-shot prompt and very different numbers of questions, short answers."""
    requests = RequestList("few_shot")
    seeds = _Seeds(rng)
    total = max(8, round(64 * num_workers * scale))
    shares = rng.dirichlet(np.full(max(4, num_workers), 0.7))
    for share in shares:
        prefix, length = seeds(), int(rng.integers(1500, 5000))
        for _ in range(max(1, round(total * share))):
            requests.add([(prefix, length), (seeds(), int(rng.integers(40, 300)))], int(rng.integers(16, 128)))
    return requests


def unique(num_workers: int, rng: np.random.Generator, scale: float) -> RequestList:
    """Open loop: nothing shared."""
    requests = RequestList("unique")
    seeds = _Seeds(rng)
    count = _open_loop(num_workers, scale)
    lengths = _lognormal(rng, 1200, 0.8, 64, 12_000, count)
    outputs = _lognormal(rng, 200, 0.7, 8, 2000, count)
    for arrival, length, output in zip(_poisson(rng, 8 * num_workers, count), lengths, outputs, strict=True):
        requests.add([(seeds(), int(length))], int(output), float(arrival))
    return requests


def thrash(num_workers: int, rng: np.random.Generator, scale: float) -> RequestList:
    """Closed loop: prefixes that fill 6/7 of the fleet's caches (1,024 blocks each), each asked for in every round."""
    requests = RequestList("thrash", users=4 * num_workers, num_blocks=1024)
    seeds = _Seeds(rng)
    length = 4096
    count = max(1, 1024 * num_workers * 64 * 6 // (7 * length))
    prefixes = [seeds() for _ in range(count)]
    for _ in range(max(1, round(5 * scale))):
        for which in rng.permutation(count):
            tail = int(rng.integers(16, 128))
            requests.add([(prefixes[which], length), (seeds(), tail)], int(rng.integers(8, 64)))
    return requests


def conversation(num_workers: int, rng: np.random.Generator, scale: float) -> RequestList:
    """The Mooncake conversation trace, sped up to the fleet: open loop, long prompts, some of them shared."""
    lines = read_trace(conversation_trace())
    count = min(len(lines), _open_loop(num_workers, scale))
    start = 0 if count == len(lines) else int(rng.integers(len(lines) - count))
    # The trace has 3.4 requests/s.
    return trace_requests("conversation", lines[start : start + count], speed=num_workers * 1.3 / 3.4)


def conversation_trace() -> Path:
    """Where the repository keeps the Mooncake trace.  Raises ValueError where there is no repository around."""
    path = Path(__file__).resolve().parents[3] / "benchmarks" / "traces" / "conversation_trace.jsonl.xz"
    if not path.exists():
        raise ValueError("the conversation trace is in the repository only: give a trace of your own with --trace")
    return path


def read_trace(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a trace (JSON lines, ``.xz`` or plain), see ``trace_requests``.  ValueError for a bad line."""
    path = Path(path)
    lines = []
    for number, line in enumerate(_text_of(path).splitlines(), 1):
        try:
            lines.append(_trace_entry(json.loads(line)))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise ValueError(
                f"{path.name}, line {number}: needs timestamp (ms), input_length, output_length, hash_ids ({error!r})"
            ) from None
    if not lines:
        raise ValueError(f"{path.name} has no requests")
    return lines


def _text_of(path: Path) -> str:
    try:
        if path.suffix == ".xz":
            import lzma

            try:
                with lzma.open(path, "rt", encoding="utf-8") as stream:
                    return stream.read()
            except (lzma.LZMAError, EOFError) as error:
                raise ValueError(f"it is no .xz file: {error}") from None
        return path.read_text(encoding="utf-8")
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None


def _trace_entry(entry: Any) -> dict[str, Any]:
    """A line of a trace with its values as numbers."""
    timestamp = float(entry["timestamp"])
    if not math.isfinite(timestamp):
        raise ValueError(f"timestamp {timestamp} is no time")
    return {
        "timestamp": timestamp,
        "input_length": int(entry["input_length"]),
        "output_length": int(entry["output_length"]),
        "hash_ids": [int(hash_id) for hash_id in entry["hash_ids"]],
    }


def trace_requests(
    name: str, lines: list[dict[str, Any]], speed: float = 1.0, max_model_len: int = 32_768
) -> RequestList:
    """A trace in Mooncake's form as requests.

    Each line has ``timestamp`` (ms), ``input_length`` and ``output_length`` (tokens) and ``hash_ids``, one for each
    512 tokens: equal ids are equal tokens.  Prompts are cut where ``max_model_len`` ends.
    """
    requests = RequestList(name)
    first = lines[0]["timestamp"]
    for entry in lines:
        output = max(1, min(entry["output_length"], 2000))
        length = max(1, min(entry["input_length"], max_model_len - output))
        segments: list[tuple[int, int]] = []
        for hash_id in entry["hash_ids"]:
            take = min(TRACE_BLOCK, length - TRACE_BLOCK * len(segments))
            if take <= 0:
                break
            segments.append((hash_id, take))
        requests.add(segments or [(0, length)], output, (entry["timestamp"] - first) / 1e3 / speed)
    return requests


WORKLOADS: dict[str, Callable[[int, np.random.Generator, float], RequestList]] = {
    function.__name__: function
    for function in (grpo, grpo_long_tail, grpo_agent, few_shot, hot_spot, thrash, unique, conversation)
}


def make(name: str, num_workers: int, seed: int, scale: float = 1.0) -> RequestList:
    """A workload by name for a fleet of this size; ``scale`` multiplies the number of requests.

    Raises ValueError for a name that is none of ``WORKLOADS``.
    """
    if name not in WORKLOADS:
        raise ValueError(f"workload '{name}' is unknown; there are: {', '.join(WORKLOADS)}")
    return WORKLOADS[name](num_workers, np.random.default_rng([seed, *name.encode()]), scale)
