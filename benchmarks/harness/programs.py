"""Building and running the programs that are measured."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "bench"
BENCH_INDEX = BUILD / "benchmarks" / "bench_index"
BENCH_DECODE = BUILD / "benchmarks" / "bench_decode"
DECISION = ROOT / "benchmarks" / "decision.py"
DYNAMO = ROOT / "benchmarks" / "peers" / "dynamo"
DYNAMO_BUILD = BUILD / "dynamo"
DYNAMO_PEER = DYNAMO_BUILD / "release" / "dynamo-peer"
TIMEOUT_S = 1800.0


class BenchError(RuntimeError):
    """A program failed, or answered wrongly."""


def say(text: str) -> None:
    """A line of progress, to stderr."""
    print(text, file=sys.stderr, flush=True)


def build() -> None:
    """Builds bench_index and bench_decode with the CMake preset `bench`."""
    say("building bench_index and bench_decode")
    _run_or_raise(["cmake", "--preset", "bench"])
    _run_or_raise(["cmake", "--build", "--preset", "bench", "--parallel", str(os.cpu_count() or 1)])


def build_dynamo() -> str | None:
    """Builds the peer program over Dynamo's crate; returns why not, if it cannot be built here."""
    if shutil.which("cargo") is None:
        return "cargo (Rust) is not installed"
    say("building the peer over dynamo-kv-router (a minute the first time)")
    command = ["cargo", "build", "--release", "--quiet"]
    environment = os.environ | {"CARGO_TARGET_DIR": str(DYNAMO_BUILD)}
    done = subprocess.run(command, cwd=DYNAMO, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        say(done.stderr[-2000:])
        return "cargo could not build benchmarks/peers/dynamo"
    return None


def run_json(command: Sequence[str | Path], cores: Sequence[int] | None = None) -> dict[str, Any]:
    """The JSON that the program prints as its last line; it may use these cores only.

    Raises BenchError if it fails, takes half an hour or prints something else.
    """
    limit = (lambda: os.sched_setaffinity(0, cores)) if cores else None
    words = [str(word) for word in command]
    name = Path(words[1] if words[0] == sys.executable else words[0]).name
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=TIMEOUT_S, preexec_fn=limit, cwd=ROOT, check=False
        )
    except subprocess.TimeoutExpired:
        raise BenchError(f"{name} did not end within {TIMEOUT_S:g} s") from None
    if done.returncode != 0:
        raise BenchError(f"{name} failed with status {done.returncode}: {done.stderr.strip()[-2000:]}")
    try:
        figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        raise BenchError(f"{name} printed no JSON: {done.stdout[-500:]!r}") from None
    return figures


def usable_cores() -> list[int]:
    """The cores that this process may use."""
    return sorted(os.sched_getaffinity(0))


def machine() -> dict[str, Any]:
    """What the figures depend on: processor, compilers, versions."""
    import numpy as np

    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*:\s*(.*)$", cpuinfo, re.MULTILINE)
    facts = {
        "processor": model[1] if model else "unknown",
        "cores": len(usable_cores()),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "compiler": _first_line([_cxx(), "--version"]),
        "rust": _first_line(["rustc", "--version"]),
        "python": sys.version.split()[0],
        "numpy": np.__version__,
    }
    return {key: value for key, value in facts.items() if value}


def _cxx() -> str:
    cache = BUILD / "CMakeCache.txt"
    found = re.search(r"^CMAKE_CXX_COMPILER:\w+=(.*)$", cache.read_text(), re.MULTILINE) if cache.exists() else None
    return found[1] if found else "c++"


def _first_line(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.splitlines()[0].strip() if done.stdout else ""


def _run_or_raise(command: Sequence[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BenchError(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-4000:]}")
