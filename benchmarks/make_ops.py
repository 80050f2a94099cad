#!/usr/bin/env python3
"""Turns a trace of requests into an op stream: what a router's prefix index sees of a fleet of workers.

A stream holds the KV events of the fleet and a look-up ahead of each request, in order.  Little endian::

    file    8 bytes "KVOP1", 0, 0, 0; u32 tokens a block; u32 workers; u64 number of ops; the ops
    op      u8 kind; u32 worker; u32 n; then by kind
      1     store: u8 has a parent; u64 the parent's engine hash; n times (u64 local hash, u64 engine hash)
      2     remove: n times u64 engine hash
      3     find: n times u64 local hash
      4     clear: nothing

Traces: a file of Mooncake's form, one JSON object a line whose ``hash_ids`` name blocks of 512 tokens by their whole
prefix (may be .xz), or ``grpo:P,G,T``, rollouts made up: P prompts a step, G samples of each, T turns, in which all
samples of a prompt share it and each goes on with words of its own.

A request goes to the least loaded of the workers that hold the longest part of its prefix, or, if that one is loaded
far above the mean or nobody holds any, to the least loaded of all.  A worker caches what it has computed and evicts
what was used least recently, the end of a prefix before its beginning.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import struct
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

MAGIC = b"KVOP1\0\0\0"
STORE, REMOVE, FIND, CLEAR = 1, 2, 3, 4
TRACE_BLOCK = 512
_MASK = 2**64 - 1


class Block(NamedTuple):
    """A block of a request: its local hash and the name that every worker's engine gives it."""

    local: int
    engine: int


@dataclass(frozen=True)
class OpsOptions:
    """How a stream is made.

    trace: path of a trace, or ``grpo:P,G,T``.
    workers: at least 1.
    block_size: tokens; a divisor of 512.  It sets how many blocks a trace's block becomes; of rollouts, only a label.
    capacity: blocks that a worker can cache.
    max_ops: no request is begun after so many ops.
    random_routing: workers are drawn by lot.
    steps: of a rollout.
    """

    trace: str
    workers: int = 8
    block_size: int = 64
    capacity: int = 20_000
    max_ops: int = 10**9
    random_routing: bool = False
    steps: int = 4
    seed: int = 1

    def __post_init__(self) -> None:
        """Raises ValueError, naming the option."""
        for name in ("workers", "block_size", "capacity", "max_ops", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if TRACE_BLOCK % self.block_size:
            raise ValueError(f"block_size must divide {TRACE_BLOCK}, got {self.block_size}")


def mix(value: int) -> int:
    """splitmix64 of a 64-bit number."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31


def read_trace(path: Path, block_size: int) -> Iterator[list[Block]]:
    """The requests of a trace file; each of its blocks becomes ``512 // block_size`` blocks."""
    parts = TRACE_BLOCK // block_size
    with lzma.open(path, "rt") if path.suffix == ".xz" else path.open() as lines:
        for line in lines:
            names = (i * 64 + part for i in json.loads(line)["hash_ids"] for part in range(parts))
            yield [Block(mix(name), mix(~name & _MASK)) for name in names]


def rollouts(prompts: int, samples: int, turns: int, steps: int, seed: int) -> Iterator[list[Block]]:
    """The requests of synthetic rollouts: every turn of every sample, in random order within a turn."""
    rng = random.Random(seed)
    for step in range(steps):
        lengths = [rng.randint(8, 32) for _ in range(prompts)]
        texts = {
            (prompt, sample): [step * 1_000_003 + prompt * 977 + k for k in range(length)]
            for prompt, length in enumerate(lengths)
            for sample in range(samples)
        }
        order = list(texts)
        for turn in range(turns):
            rng.shuffle(order)
            for prompt, sample in order:
                text = texts[prompt, sample]
                yield chained(text)
                answer = step << 40 ^ prompt << 24 ^ sample << 12 ^ turn << 6
                text += [mix(answer ^ k) for k in range(rng.randint(2, 8))]


def chained(text: Sequence[int]) -> list[Block]:
    """Blocks of these contents, named by their whole prefix."""
    blocks, engine = [], 0
    for content in text:
        local = mix(content)
        engine = mix(engine ^ local)
        blocks.append(Block(local, engine))
    return blocks


def requests_of(options: OpsOptions) -> Iterator[list[Block]]:
    """Raises ValueError for a ``grpo:`` that is not of three numbers."""
    if not options.trace.startswith("grpo:"):
        return read_trace(Path(options.trace), options.block_size)
    try:
        prompts, samples, turns = (int(text) for text in options.trace.removeprefix("grpo:").split(","))
    except ValueError:
        raise ValueError(f"trace: expected grpo:P,G,T with three numbers, got {options.trace!r}") from None
    return rollouts(prompts, samples, turns, options.steps, options.seed)


class Fleet:
    """The caches and the load of the workers."""

    def __init__(self, options: OpsOptions) -> None:
        self.options = options
        self.caches: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(options.workers)]  # LRU first
        self.holders: defaultdict[int, set[int]] = defaultdict(set)
        self.load = [0] * options.workers
        self.rng = random.Random(options.seed)

    def choose(self, request: Sequence[Block]) -> int:
        """The worker that the request goes to."""
        if self.options.random_routing:
            return self.rng.randrange(self.options.workers)
        best = self._holders_of_longest_prefix(request)
        if best:
            choice = min(best, key=self.load.__getitem__)
            if self.load[choice] <= 1.5 * (sum(self.load) / self.options.workers) + 2000:
                return choice
        return min(range(self.options.workers), key=lambda worker: (self.load[worker], self.rng.random()))

    def _holders_of_longest_prefix(self, request: Sequence[Block]) -> set[int]:
        best: set[int] = set()
        for depth, block in enumerate(request):
            holders = self.holders.get(block.engine, set())
            common = best & holders if depth else set(holders)
            if not common:
                break
            best = common
        return best

    def evict(self, worker: int, request: Sequence[Block], hits: int) -> list[int]:
        """Makes room for what `worker` has to compute; returns the engine hashes evicted."""
        cache = self.caches[worker]
        pinned = {block.engine for block in request}
        need = len(cache) + len(request) - hits - self.options.capacity
        evicted: list[int] = []
        spared = 0  # in a row: once round the cache there is nothing left to evict
        while need > len(evicted) and len(cache) > hits and spared < len(cache):
            engine, _ = cache.popitem(last=False)
            if engine in pinned:
                cache[engine] = None
                spared += 1
                continue
            spared = 0
            self.holders[engine].discard(worker)
            evicted.append(engine)
        return evicted

    def serve(self, worker: int, request: Sequence[Block]) -> Iterator[bytes]:
        """Computes the request; yields the events."""
        cache = self.caches[worker]
        hits = next((k for k, block in enumerate(request) if block.engine not in cache), len(request))
        self.load[worker] += len(request) - hits
        for block in reversed(request[:hits]):
            cache.move_to_end(block.engine)
        fresh = request[hits:]
        if not fresh:
            return
        evicted = self.evict(worker, request, hits)
        if evicted:
            yield struct.pack(f"<BII{len(evicted)}Q", REMOVE, worker, len(evicted), *evicted)
        parent = request[hits - 1].engine if hits else 0
        flat = [number for block in fresh for number in block]
        yield struct.pack(f"<BIIBQ{len(flat)}Q", STORE, worker, len(fresh), hits > 0, parent, *flat)
        for block in reversed(fresh):
            cache[block.engine] = None
            self.holders[block.engine].add(worker)


def write_ops(options: OpsOptions, file: IO[bytes]) -> dict[str, int]:
    """Writes the stream of these options; returns ``ops``, ``live_pairs`` (cached at the end) and ``workers``."""
    fleet = Fleet(options)
    file.write(MAGIC + struct.pack("<IIQ", options.block_size, options.workers, 0))
    ops = 0
    for request in requests_of(options):
        if ops >= options.max_ops:
            break
        if not request:
            continue
        file.write(struct.pack(f"<BII{len(request)}Q", FIND, 0, len(request), *(block.local for block in request)))
        ops += 1
        for event in fleet.serve(fleet.choose(request), request):
            file.write(event)
            ops += 1
    file.seek(len(MAGIC) + 8)
    file.write(struct.pack("<Q", ops))
    return {"ops": ops, "live_pairs": sum(map(len, fleet.caches)), "workers": options.workers}


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace")
    parser.add_argument("out", type=Path)
    parser.add_argument("--workers", type=int, default=OpsOptions.workers)
    parser.add_argument("--block-size", type=int, default=OpsOptions.block_size, help="tokens")
    parser.add_argument("--capacity", type=int, default=OpsOptions.capacity, help="blocks a worker can cache")
    parser.add_argument("--max-ops", type=int, default=OpsOptions.max_ops)
    parser.add_argument("--random", dest="random_routing", action="store_true", help="draw workers by lot")
    parser.add_argument("--steps", type=int, default=OpsOptions.steps, help="of a rollout")
    parser.add_argument("--seed", type=int, default=OpsOptions.seed)
    arguments = vars(parser.parse_args())
    out: Path = arguments.pop("out")
    try:
        options = OpsOptions(**arguments)
        with out.open("wb") as file:
            summary = write_ops(options, file)
    except (OSError, ValueError) as error:
        print(f"make_ops: {error}", file=sys.stderr)
        return 1
    print(json.dumps({"out": out.name, **summary}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
