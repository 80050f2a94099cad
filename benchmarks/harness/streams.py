"""The op streams that are measured, made once and kept with the answers that every index must give."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import make_ops
import naive_check
from make_ops import OpsOptions

TRACE = Path(__file__).parents[1] / "traces" / "conversation_trace.jsonl.xz"
CONVERSATION = str(TRACE)


@dataclass(frozen=True)
class Stream:
    """name: short, of files and plots.  title: what it is, for tables."""

    name: str
    title: str
    options: OpsOptions


@dataclass(frozen=True)
class MadeStream:
    """A stream's file, and the checksums of an index that is right."""

    stream: Stream
    path: Path
    ops: int
    live_pairs: int
    checksums: dict[str, str]


STREAMS = (
    Stream("conversation-8", "conversation, 8 workers", OpsOptions(CONVERSATION, workers=8)),
    Stream("conversation-64", "conversation, 64 workers", OpsOptions(CONVERSATION, workers=64)),
    Stream(
        "conversation-512",
        "conversation, 512 workers, 16-token blocks, 20,000 ops",
        OpsOptions(CONVERSATION, workers=512, block_size=16, max_ops=20_000),
    ),
    Stream("rollout-32", "rollout 64 x 16 x 4, 8 steps, 32 workers", OpsOptions("grpo:64,16,4", workers=32, steps=8)),
    Stream(
        "random-16",
        "conversation, 16 workers, routed at random",
        OpsOptions(CONVERSATION, workers=16, random_routing=True),
    ),
    Stream(
        "small-cache-24",
        "conversation, 24 workers of 1,500 blocks",
        OpsOptions(CONVERSATION, workers=24, capacity=1_500),
    ),
    Stream(
        "conversation-200",
        "conversation, 200 workers, 32-token blocks, another seed",
        OpsOptions(CONVERSATION, workers=200, block_size=32, max_ops=12_000, seed=7),
    ),
)

QUICK_STREAMS = (
    Stream("conversation-8", "conversation, 8 workers, 3,000 ops", OpsOptions(CONVERSATION, workers=8, max_ops=3_000)),
    Stream(
        "random-100",
        "conversation, 100 workers, routed at random, 32-token blocks, 1,500 ops",
        OpsOptions(CONVERSATION, workers=100, block_size=32, max_ops=1_500, random_routing=True),
    ),
    Stream(
        "rollout-8",
        "rollout 8 x 4 x 3, 3 steps, 8 workers of 400 blocks",
        OpsOptions("grpo:8,4,3", workers=8, capacity=400, steps=3),
    ),
)


def make_stream(stream: Stream, folder: Path) -> MadeStream:
    """Makes the stream's file and checksums in `folder`, unless they are there."""
    path = folder / f"{stream.name}-{_digest(stream)}.ops"
    facts_path = path.with_suffix(".json")
    if not (path.exists() and facts_path.exists()):
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            facts: dict[str, Any] = dict(make_ops.write_ops(stream.options, file))
        facts["checksums"] = naive_check.checksums(path)
        facts_path.write_text(json.dumps(facts))
    facts = json.loads(facts_path.read_text())
    return MadeStream(stream, path, facts["ops"], facts["live_pairs"], facts["checksums"])


def _digest(stream: Stream) -> str:
    """Another one when the stream, the generator or the checker is another."""
    options = asdict(stream.options)
    if options["trace"] == CONVERSATION:
        options["trace"] = hashlib.sha256(TRACE.read_bytes()).hexdigest()
    sources = [Path(module.__file__ or "").read_text() for module in (make_ops, naive_check)]
    return hashlib.sha256(json.dumps([options, *sources]).encode()).hexdigest()[:10]
