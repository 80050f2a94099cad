"""The benchmark programs: what they measure is right, and what they read is checked."""

from __future__ import annotations

import hashlib
import io
import json
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import make_ops  # noqa: E402
import naive_check  # noqa: E402
from harness.summary import summarise  # noqa: E402
from harness.targets import advantage  # noqa: E402
from make_ops import CLEAR, FIND, REMOVE, STORE, OpsOptions  # noqa: E402

PROGRAMS = ROOT / "build" / "bench" / "benchmarks"
TRACE = str(ROOT / "benchmarks" / "traces" / "conversation_trace.jsonl.xz")


@pytest.fixture(scope="module")
def programs():
    """The folder of the built programs."""
    for tool in ("cmake", "ninja"):
        if shutil.which(tool) is None:
            pytest.skip(f"the benchmark programs are not built: {tool} is not installed")
    for command in (["cmake", "--preset", "bench"], ["cmake", "--build", "--preset", "bench", "--parallel", "2"]):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return PROGRAMS


def run(program, *arguments):
    command = [str(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def run_json(program, *arguments):
    done = run(program, *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def written(path, options):
    with path.open("wb") as file:
        make_ops.write_ops(options, file)
    return path


def pack(ops, workers):
    """A stream of (kind, worker, parent, hashes), where the hashes of a store are (local, engine) by turns."""
    out = [make_ops.MAGIC, struct.pack("<IIQ", 64, workers, len(ops))]
    for kind, worker, parent, hashes in ops:
        n = len(hashes) // 2 if kind == STORE else len(hashes)
        out.append(struct.pack("<BII", kind, worker, n))
        if kind == STORE:
            out.append(struct.pack("<BQ", parent is not None, parent or 0))
        out.append(struct.pack(f"<{len(hashes)}Q", *hashes))
    return b"".join(out)


def random_walk(seed, workers, num_ops=3000):
    """Events in no sensible order: stores in the middle of nowhere, double stores, removals of anything, clears."""
    rng = random.Random(seed)
    paths = [()]
    while len(paths) < 150:
        parent = rng.choice(paths[-30:])
        paths.append((*parent, rng.randrange(3)))
    local = {content: make_ops.mix(content) for content in range(3)}
    engine = {path: make_ops.mix(hash(path) & (2**64 - 1)) for path in paths}
    ops = []
    for _ in range(num_ops):
        worker, path = rng.randrange(workers), rng.choice(paths[1:])
        kind = rng.choices((STORE, REMOVE, FIND, CLEAR), (50, 25, 25, 0.3))[0]
        start = rng.randrange(len(path)) if rng.random() < 0.5 else 0
        prefixes = [path[: depth + 1] for depth in range(start, len(path))]
        if kind == STORE:
            hashes = [number for prefix in prefixes for number in (local[prefix[-1]], engine[prefix])]
            ops.append((STORE, worker, engine[path[:start]] if start else None, hashes))
        elif kind == REMOVE:
            ops.append((REMOVE, worker, None, [engine[rng.choice(paths[1:])] for _ in range(rng.randrange(1, 5))]))
        elif kind == FIND:
            ops.append((FIND, 0, None, [local[content] for content in path]))
        else:
            ops.append((CLEAR, worker, None, []))
    return pack(ops, workers)


STREAMS = {
    "conversation": OpsOptions(TRACE, workers=8, max_ops=1500),
    "random routing, more than 64 workers": OpsOptions(TRACE, workers=70, max_ops=1000, random_routing=True),
    "full caches": OpsOptions(TRACE, workers=3, capacity=700, max_ops=1500, block_size=32),
    "rollout, full caches": OpsOptions("grpo:8,4,3", workers=5, capacity=150, steps=2),
}


@pytest.mark.parametrize("options", STREAMS.values(), ids=STREAMS.keys())
def test_index_answers_as_the_naive_model(programs, tmp_path, options):
    path = written(tmp_path / "stream.ops", options)
    figures = run_json(programs / "bench_index", path)
    right = naive_check.checksums(path)
    assert {name: figures[name] for name in right} == right
    assert figures["ops"] == "stream.ops"
    for key in ("event_blocks_per_s", "find_per_s", "find_blocks_per_s", "find_p50_ns", "find_p99_ns", "find_p999_ns"):
        assert figures[key] > 0
    assert figures["rss_bytes"] >= 0


@pytest.mark.parametrize("workers", [1, 5, 65])
def test_index_answers_as_the_naive_model_whatever_the_order_of_events(programs, tmp_path, workers):
    path = tmp_path / "walk.ops"
    path.write_bytes(random_walk(seed=workers, workers=workers))
    figures = run_json(programs / "bench_index", path, "--repeat", 2)
    right = naive_check.checksums(path)
    assert {name: figures[name] for name in right} == right


def test_concurrent_writing_leaves_the_index_as_it_was(programs, tmp_path):
    path = written(tmp_path / "stream.ops", OpsOptions("grpo:8,4,3", workers=5, capacity=150, steps=2))
    figures = run_json(programs / "bench_index", path, "--threads", 3, "--seconds", 0.2)  # fails itself if not
    assert figures["readers"] == 2
    assert figures["event_blocks_per_s_under_read"] > 0
    for suffix in ("_quiet", "_under_write"):
        assert 0 < figures["find_p50_ns" + suffix] <= figures["find_p99_ns" + suffix] <= figures["find_max_ns" + suffix]


def test_churn_leaves_nothing_behind(programs):
    figures = run_json(programs / "bench_index", "--churn", 1001, 7)  # a chain that is not full, every way to remove
    assert figures["pairs_left"] == 0
    assert figures["rss_bytes_full_last"] >= figures["rss_bytes_empty"]


def test_decoding_sees_what_was_written(programs):
    figures = run_json(programs / "bench_decode", "--blocks", 1000, "--repeat", 1)  # fails itself if not
    assert [case["case"] for case in figures["cases"]] == ["map", "array", "map_evicting", "recording"]
    assert all(case["decode_apply"]["blocks_per_s"] > 0 for case in figures["cases"])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no op stream"),
        (b"KVOP2\0\0\0" + bytes(16), "no op stream"),
        (make_ops.MAGIC + struct.pack("<IIQ", 64, 0, 0), "has no workers"),
        (make_ops.MAGIC + struct.pack("<IIQ", 64, 2, 1), "ends in the middle of an op"),
        (make_ops.MAGIC + struct.pack("<IIQBII", 64, 2, 1, REMOVE, 0, 2**32 - 1), "ends in the middle of an op"),
        (make_ops.MAGIC + struct.pack("<IIQBII", 64, 2, 1, FIND, 2, 0), "names worker 2"),
        (make_ops.MAGIC + struct.pack("<IIQBII", 64, 2, 1, 9, 0, 0), "unknown kind 9"),
        (make_ops.MAGIC + struct.pack("<IIQ", 64, 2, 0) + b"x", "goes on after its last op"),
        (make_ops.MAGIC + struct.pack("<IIQ", 64, 2, 0), "nothing to measure"),
    ],
)
def test_a_broken_stream_is_refused(programs, tmp_path, data, message):
    path = tmp_path / "broken.ops"
    path.write_bytes(data)
    done = run(programs / "bench_index", path)
    assert done.returncode == 1
    assert message in done.stderr


@pytest.mark.parametrize(
    "arguments", [[], ["a", "b"], ["a", "--threads", "0"], ["a", "--threads"], ["a", "--churn", "1", "1"], ["--x"]]
)
def test_wrong_arguments_are_refused(programs, arguments):
    done = run(programs / "bench_index", *arguments)
    assert done.returncode == 2
    assert "usage:" in done.stderr


# --- the generator and the naive model ---


def test_streams_stay_the_same():
    """Figures of different days are comparable only as long as the streams are."""
    digests = {}
    for name, options in {
        "rollout": OpsOptions("grpo:4,3,2", workers=3, capacity=120, steps=2),
        "conversation": OpsOptions(TRACE, workers=5, max_ops=400, seed=3, block_size=128),
    }.items():
        file = io.BytesIO()
        make_ops.write_ops(options, file)
        digests[name] = hashlib.sha256(file.getvalue()).hexdigest()[:16]
    assert digests == {"rollout": "214e4cdedadf0e1d", "conversation": "9cbd7038c53260cb"}


def test_naive_model_counts_leading_blocks(tmp_path):
    index = naive_check.NaiveIndex()
    index.apply(naive_check.Op(STORE, 0, None, [1, 11, 2, 12, 3, 13]))
    index.apply(naive_check.Op(STORE, 1, 11, [2, 12]))
    assert index.find([1, 2, 3, 4]) == {0: 3}  # worker 1 lacks the first block
    index.apply(naive_check.Op(STORE, 1, None, [1, 11]))
    assert index.find([1, 2, 3]) == {0: 3, 1: 2}
    index.apply(naive_check.Op(REMOVE, 0, None, [12]))
    assert index.find([1, 2, 3]) == {0: 1, 1: 2}
    index.apply(naive_check.Op(CLEAR, 1, None, []))
    assert index.find([1, 2, 3]) == {0: 1}
    assert index.find([2]) == {}


@pytest.mark.parametrize(
    "options",
    [{"workers": 0}, {"block_size": 100}, {"capacity": 0}, {"max_ops": 0}, {"steps": 0}],
)
def test_generator_refuses_options_that_make_no_sense(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        OpsOptions("grpo:1,1,1", **options)


def test_generator_refuses_a_rollout_without_three_numbers():
    with pytest.raises(ValueError, match="expected grpo:P,G,T"):
        make_ops.write_ops(OpsOptions("grpo:1,2"), io.BytesIO())


def test_a_cache_smaller_than_a_request_ends():
    """All that is cached is the request's own: there is nothing to evict."""
    file = io.BytesIO()
    summary = make_ops.write_ops(OpsOptions("grpo:2,2,3", workers=1, capacity=2, steps=1), file)
    assert summary["ops"] > 0


# --- the report ---


def test_ratios_are_above_one_when_ours_is_better():
    ours, peer = (summarise([{"find_per_s": n, "find_p99_ns": n}]) for n in (30, 10))
    assert advantage(ours, peer, "find_per_s", more_is_better=True) == 3
    assert advantage(peer, ours, "find_p99_ns", more_is_better=False) == 3


def test_summary_keeps_median_and_spread():
    runs = [{"p50": value, "name": "x", "nested": {"n": value}} for value in (5, 1, 3)]
    spread = {"median": 3, "min": 1, "max": 5}
    assert summarise(runs) == {"p50": spread, "name": "x", "nested": {"n": spread}}
