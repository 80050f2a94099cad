"""What the project wants of itself, and whether a run's results reach it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from harness.summary import median

OURS = "kvrouter"
CONCURRENT = "dynamo ConcurrentRadixTreeCompressed"
RADIX = "dynamo RadixTree"

#: (figure, what it is called, whether more is better)
INDEX_FIGURES = (
    ("event_blocks_per_s", "events", True),
    ("find_per_s", "finds", True),
    ("find_p99_ns", "find p99", False),
    ("rss_bytes", "memory", False),
)
NEEDED = {
    CONCURRENT: {"event_blocks_per_s": 2.0, "find_per_s": 3.0, "find_p99_ns": 3.0, "rss_bytes": 2.0},
    RADIX: {"event_blocks_per_s": 1.0, "find_per_s": 1.0, "find_p99_ns": 1.0, "rss_bytes": 1.0},
}
MAX_WRITE_PENALTY = 1.5
MIN_DECODED_BLOCKS_PER_S = 2e6
MAX_DECISION_US = 4.0
MIN_LIST_SPEED_UP = 5.0
DECISION_WORKERS = 32
#: What the allocator keeps back varies by some pages from round to round.
MAX_CHURN_GROWTH = 1.02


@dataclass(frozen=True)
class Target:
    """A target and how it stands.

    what: the figure, and where it was worst.  needed, measured: as text.
    """

    what: str
    needed: str
    measured: str
    met: bool

    def as_json(self) -> dict[str, Any]:
        """All fields."""
        return {"what": self.what, "needed": self.needed, "measured": self.measured, "met": self.met}


def advantage(ours: dict[str, Any], peer: dict[str, Any], figure: str, *, more_is_better: bool) -> float:
    """How many times better ours is; above 1 is better, whichever way the figure goes."""
    a, b = median(ours, figure), median(peer, figure)
    if not more_is_better:
        a, b = b, a
    return a / b if b else float("inf")


def targets(results: dict[str, Any]) -> list[Target]:
    """Every target that the results say something about."""
    return [
        *_index_targets(results["streams"]),
        *_write_targets(results["streams"]),
        *_decision_targets(results["decision"]),
        *_decode_targets(results["decode"]),
        *_churn_targets(results["churn"]),
    ]


def _index_targets(streams: list[dict[str, Any]]) -> Iterator[Target]:
    for peer, needs in NEEDED.items():
        for figure, name, more_is_better in INDEX_FIGURES:
            ratios = [
                (advantage(s["peers"][OURS], s["peers"][peer], figure, more_is_better=more_is_better), s["name"])
                for s in streams
                if peer in s["peers"]
            ]
            if not ratios:
                continue
            worst, where = min(ratios)
            need = needs[figure]
            met = worst > need if need == 1 else worst >= need
            needed = "ahead on every stream" if need == 1 else f"{need:g}x better on every stream"
            yield Target(f"{name} against {_short(peer)}", needed, f"{worst:.2f}x at worst ({where})", met)


def _write_targets(streams: list[dict[str, Any]]) -> Iterator[Target]:
    key = "find_p99_ns_under_write"
    ratios = [
        (median(ours, key) / max(1, median(ours, "find_p99_ns_quiet")), stream["name"])
        for stream in streams
        if key in (ours := stream["peers"][OURS])
    ]
    if ratios:
        worst, where = max(ratios)
        needed = f"at most {MAX_WRITE_PENALTY:g}x the quiet one"
        met = worst <= MAX_WRITE_PENALTY
        yield Target("find p99 beside a writer at full speed", needed, f"{worst:.2f}x at worst ({where})", met)


def _decision_targets(rows: list[dict[str, Any]]) -> Iterator[Target]:
    p50 = {row["variant"]: median(row, "p50_us") for row in rows if row["workers"] == DECISION_WORKERS}
    for kind in ("int32", "int64"):
        us = p50.get(f"best_worker, {kind} array")
        if us is not None:
            what = f"tokens to worker, {kind} array of 2,048 tokens, {DECISION_WORKERS} workers, p50"
            yield Target(what, f"at most {MAX_DECISION_US:g} us", f"{us:.2f} us", us <= MAX_DECISION_US)
    ours, reference = p50.get("best_worker, list"), p50.get("reference, list")
    if ours and reference:
        what = f"the same from a list, against the reference ({reference:.0f} us)"
        ratio = reference / ours
        yield Target(what, f"{MIN_LIST_SPEED_UP:g}x faster", f"{ratio:.1f}x", ratio >= MIN_LIST_SPEED_UP)


def _decode_targets(cases: list[dict[str, Any]]) -> Iterator[Target]:
    speeds = [(median(case["decode_apply"], "blocks_per_s"), case["case"]) for case in cases]
    if speeds:
        worst, where = min(speeds)
        needed = f"at least {MIN_DECODED_BLOCKS_PER_S / 1e6:g} M blocks/s on one core"
        met = worst >= MIN_DECODED_BLOCKS_PER_S
        yield Target("decoding and applying raw batches", needed, f"{worst / 1e6:.2f} M at worst ({where})", met)


def _churn_targets(churn: dict[str, Any]) -> Iterator[Target]:
    if churn:
        first, last = median(churn, "rss_bytes_first"), median(churn, "rss_bytes_last")
        what = (
            f"{median(churn, 'churn_pairs'):,.0f} pairs in and out {median(churn, 'churn_rounds'):,.0f} times: memory"
        )
        measured = f"{first / 1e6:.1f} MB after the first round, {last / 1e6:.1f} MB after the last"
        yield Target(what, "back where it was", measured, last <= first * MAX_CHURN_GROWTH)


def _short(peer: str) -> str:
    return peer.removeprefix("dynamo ")
