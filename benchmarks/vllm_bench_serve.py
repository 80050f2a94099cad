"""vLLM's own load generator, ``vllm bench serve``, through the gateway: does it work unchanged, and what does it see?

    python benchmarks/vllm_bench_serve.py [--num-prompts 240] [--max-concurrency 8] [--request-rate inf]

Two real vLLM workers with a small random-weight model, ``kvrouter serve`` before them, streamed completions of text
prompts (the dataset ``prefix_repetition``: ``--num-prefixes`` prefixes of 1,024 tokens, suffixes of 64).  Once with the
policy ``linear`` and once round robin, the caches emptied in between; hit rates are the workers' own counters.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from kvrouter.bench import counters
from kvrouter.vllm import WorkerFleet, launch_workers
from kvrouter.vllm.tiny_model import TinyModel, make_tiny_model

POLICIES = ("linear", "round_robin")

#: The subcommand without the ``vllm`` command, which asks for a version that the CPU build's package does not have.
BENCH_SERVE = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


def bench_serve_command() -> list[str]:
    """``vllm bench serve``, or the same by Python where the command cannot run."""
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return [sys.executable, "-c", BENCH_SERVE]
    return ["vllm", "bench", "serve"]


@contextlib.contextmanager
def serving(fleet: WorkerFleet, policy: str) -> Iterator[str]:
    """``kvrouter serve`` before the workers, ready: its URL."""
    command = [sys.executable, "-m", "kvrouter.cli", "serve", "--port=0", f"--policy={policy}"]
    for worker in fleet.workers:
        command.append(f"--worker={worker.url},kv_events={worker.kv_events_endpoint},load={worker.load_endpoint}")
    gateway = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert gateway.stdout is not None
        url = next(word for line in gateway.stdout for word in line.split() if word.startswith("http://"))
        deadline = time.monotonic() + 60
        while not ready(url, len(fleet.workers)):
            if time.monotonic() > deadline:
                raise SystemExit("the gateway does not see every worker")
            time.sleep(0.1)
        yield url
    finally:
        gateway.terminate()
        gateway.wait()


def ready(url: str, num_workers: int) -> bool:
    """Whether the gateway has reached every worker and its events."""
    with urllib.request.urlopen(f"{url}/workers", timeout=10) as answer:
        workers = json.load(answer)["workers"]
    seen = [worker for worker in workers if worker["healthy"] and worker["state"] == "up" and worker["models"]]
    return len(seen) == num_workers


def run(url: str, fleet: WorkerFleet, tiny: TinyModel, result: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What ``vllm bench serve`` writes into its result file."""
    command = [
        *bench_serve_command(),
        f"--base-url={url}",
        "--endpoint=/v1/completions",
        f"--model={fleet.model}",
        f"--tokenizer={tiny.tokenizer}",
        "--dataset-name=prefix_repetition",
        f"--num-prompts={args.num_prompts}",
        "--prefix-repetition-prefix-len=1024",
        "--prefix-repetition-suffix-len=64",
        f"--prefix-repetition-num-prefixes={args.num_prefixes}",
        "--prefix-repetition-output-len=16",
        f"--max-concurrency={args.max_concurrency}",
        f"--request-rate={args.request_rate}",
        "--ignore-eos",
        "--save-result",
        "--save-detailed",
        f"--result-dir={result.parent}",
        f"--result-filename={result.name}",
    ]
    done = subprocess.run(command, check=False, capture_output=not args.verbose, text=True)
    if done.returncode != 0 or not result.exists():
        raise SystemExit(f"vllm bench serve failed:\n{(done.stderr or '')[-4000:]}")
    figures: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return figures


def main() -> None:
    """Starts workers, and loads them by way of gateways."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--num-prompts", type=int, default=240)
    parser.add_argument("--num-prefixes", type=int, default=40, help="40 fit two caches of 448 blocks, but not one")
    parser.add_argument("--max-concurrency", type=int, default=8)
    parser.add_argument("--request-rate", default="inf", help="requests a second; inf: as many as the concurrency lets")
    parser.add_argument("--verbose", action="store_true", help="show what vllm bench serve prints")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tiny = make_tiny_model(Path(folder) / "model")
        with launch_workers(2, model=tiny, num_gpu_blocks=448, max_model_len=2048, progress=False) as fleet:
            for policy in POLICIES:
                fleet.reset_prefix_caches()
                with serving(fleet, policy) as url:
                    before = [counters.scrape(worker.url) for worker in fleet.workers]
                    figures = run(url, fleet, tiny, Path(folder) / f"{policy}.json", args)
                    rate = counters.hit_rate(before, [counters.scrape(worker.url) for worker in fleet.workers])
                print(
                    f"{policy:11} {figures['completed']} completed, {figures['failed']} failed, "
                    f"{figures['request_throughput']:.1f} requests/s, TTFT mean {figures['mean_ttft_ms']:.0f} ms, "
                    f"p50 {figures['median_ttft_ms']:.0f}, p99 {figures['p99_ttft_ms']:.0f}, "
                    f"hit rate {100 * (rate or 0):.1f}%",
                    flush=True,
                )
                if figures["completed"] != args.num_prompts:
                    errors = sorted({error for error in figures["errors"] if error})
                    raise SystemExit("not every request was answered: " + "; ".join(errors))


if __name__ == "__main__":
    main()
