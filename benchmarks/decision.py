#!/usr/bin/env python3
"""From the tokens of a request to a worker, in Python: ``KvRouter`` beside the way a router in Python over Dynamo's
binding does it (its block hashes, its radix tree, the score in NumPy).

For each number of workers, 256 prompts of random tokens are cached, each by one worker, and asked for by lot; all
variants answer the same prompts, by turns of some hundred calls.  Prints a table to stderr and one line of JSON.  Needs
the package kvrouter, and ``ai-dynamo-runtime`` for the reference, which is left out when it is not there.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvrouter import KvRouter, compute_block_hashes

BLOCK_SIZE = 64
VOCABULARY = 150_000
NUM_PROMPTS = 256
CALLS_A_TURN = 150
WARM_UP_CALLS = 20

Decide = Callable[[Any], int]


@dataclass
class Fleet:
    """What both routers are told: prompts, who caches them, and how loaded the workers are."""

    workers: int
    tokens: int
    prompts: list[list[int]] = field(init=False)
    usage: list[float] = field(init=False)
    waiting: list[int] = field(init=False)

    def __post_init__(self) -> None:
        rng = random.Random(0)
        self.prompts = [[rng.randrange(VOCABULARY) for _ in range(self.tokens)] for _ in range(NUM_PROMPTS)]
        self.usage = [rng.random() for _ in range(self.workers)]
        self.waiting = [rng.randrange(10) for _ in range(self.workers)]

    def holder(self, prompt: int) -> int:
        """The worker that caches a prompt."""
        return prompt % self.workers

    def engine_hashes(self, prompt: int) -> list[int]:
        """The names of a prompt's blocks."""
        rng = random.Random(prompt + 1)
        return [rng.getrandbits(63) for _ in range(self.tokens // BLOCK_SIZE)]


@dataclass
class Variant:
    """A way to decide, and what was measured of it."""

    name: str
    decide: Decide
    inputs: Sequence[Any]
    ns: list[int] = field(default_factory=list)
    right: int = 0

    def figures(self) -> dict[str, Any]:
        """Percentiles in microseconds, and the share of decisions for the worker that caches the prompt."""
        ordered = sorted(self.ns)

        def percentile(q: float) -> float:
            return round(ordered[int((len(ordered) - 1) * q)] / 1e3, 2)

        return {
            "variant": self.name,
            "p50_us": percentile(0.5),
            "p99_us": percentile(0.99),
            "chose_the_holder": round(self.right / len(ordered), 4),
        }


def make_router(fleet: Fleet) -> KvRouter:
    """A router that is not started: told what the workers cache and how loaded they are, as their messages would."""
    router = KvRouter(BLOCK_SIZE, fleet.workers, base_kv_events_port=20_000, base_metrics_port=40_000, seed=1)
    core = router._core
    for prompt, tokens in enumerate(fleet.prompts):
        core.index.store(
            fleet.holder(prompt), None, compute_block_hashes(tokens, BLOCK_SIZE), fleet.engine_hashes(prompt)
        )
    tell_load(router, fleet)
    return router


def tell_load(router: KvRouter, fleet: Fleet) -> None:
    """Also takes back what the router added to the queues by its own decisions."""
    for worker in range(fleet.workers):
        router._core.update_load(worker, fleet.usage[worker], fleet.waiting[worker])


def make_reference(fleet: Fleet) -> Decide | None:
    """The reference's decision; None, and a line that says so, without Dynamo's package."""
    try:
        from dynamo._core import RadixTree, compute_block_hash_for_seq
    except ImportError:
        print("ai-dynamo-runtime is not installed: the reference is left out", file=sys.stderr)
        return None
    tree = RadixTree()
    for prompt, tokens in enumerate(fleet.prompts):
        hashes = zip(fleet.engine_hashes(prompt), compute_block_hash_for_seq(tokens, BLOCK_SIZE), strict=True)
        blocks = [{"block_hash": engine, "tokens_hash": local} for engine, local in hashes]
        stored = {"parent_hash": None, "blocks": blocks}
        event = {"event_id": prompt, "data": {"stored": stored}, "dp_rank": 0}
        tree.apply_event(fleet.holder(prompt), json.dumps(event).encode())
    workers, usage, waiting = fleet.workers, fleet.usage, fleet.waiting

    def decide(tokens: list[int]) -> int:
        scores: Any = tree.find_matches(compute_block_hash_for_seq(tokens, BLOCK_SIZE)).scores
        blocks: dict[int, int] = {}
        for (worker, _rank), count in scores.items():
            blocks[worker] = blocks.get(worker, 0) + count
        overlap = {worker: blocks.get(worker, 0) * BLOCK_SIZE / len(tokens) for worker in range(workers)}
        longest = max(waiting)
        queue = [count / longest if longest else 0.0 for count in waiting]
        logits = np.array([2 * overlap[worker] - usage[worker] - queue[worker] for worker in range(workers)])
        return int(np.random.choice(np.flatnonzero(logits == logits.max())))

    return decide


def variants_of(router: KvRouter, fleet: Fleet) -> list[Variant]:
    """Everything that is measured, the reference last."""
    prompts = fleet.prompts
    int32 = [np.array(tokens, dtype=np.int32) for tokens in prompts]
    int64 = [np.array(tokens, dtype=np.int64) for tokens in prompts]

    def best_worker(tokens: Any) -> int:
        return router.best_worker(tokens=tokens)

    def route(tokens: Any) -> int:
        return router.route(tokens).worker

    variants = [
        Variant("best_worker, int32 array", best_worker, int32),
        Variant("best_worker, int64 array", best_worker, int64),
        Variant("best_worker, list", best_worker, prompts),
        Variant("route, int32 array", route, int32),
    ]
    reference = make_reference(fleet)
    if reference is not None:
        variants.append(Variant("reference, list", reference, prompts))
    return variants


def take_turn(variant: Variant, fleet: Fleet, order: Sequence[int], *, keep: bool) -> None:
    """Decides for these prompts; each call is timed by itself."""
    decide, inputs, clock = variant.decide, variant.inputs, time.perf_counter_ns
    for prompt in order:
        tokens = inputs[prompt]
        start = clock()
        worker = decide(tokens)
        ns = clock() - start
        if keep:
            variant.ns.append(ns)
            variant.right += worker == fleet.holder(prompt)


def measure(fleet: Fleet, calls: int) -> list[dict[str, Any]]:
    """The figures of every variant for one fleet."""
    router = make_router(fleet)
    variants = variants_of(router, fleet)
    rng = random.Random(2)
    for turn in range(-1, max(1, calls // CALLS_A_TURN)):
        count = WARM_UP_CALLS if turn < 0 else min(calls, CALLS_A_TURN)
        order = [rng.randrange(NUM_PROMPTS) for _ in range(count)]
        for variant in variants:
            tell_load(router, fleet)
            take_turn(variant, fleet, order, keep=turn >= 0)
    return [{"workers": fleet.workers, "tokens": fleet.tokens, **variant.figures()} for variant in variants]


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """To stderr."""
    print(f"{'workers':>8}  {'variant':<26}{'p50 [us]':>10}{'p99 [us]':>10}  right", file=sys.stderr)
    for row in rows:
        print(
            f"{row['workers']:>8}  {row['variant']:<26}{row['p50_us']:>10.2f}{row['p99_us']:>10.2f}"
            f"  {row['chose_the_holder']:.0%}",
            file=sys.stderr,
        )


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[8, 32, 256, 512])
    parser.add_argument("--tokens", type=int, default=2048, help=f"of a prompt; at least {BLOCK_SIZE}")
    parser.add_argument("--calls", type=int, default=3000, help="of each variant")
    options = parser.parse_args()
    if min(options.workers) < 1 or options.tokens < BLOCK_SIZE or options.calls < 1:
        parser.error(f"--workers and --calls must be at least 1, --tokens at least {BLOCK_SIZE}")
    rows = [row for workers in options.workers for row in measure(Fleet(workers, options.tokens), options.calls)]
    print_table(rows)
    print(json.dumps({"block_size": BLOCK_SIZE, "decisions": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
