"""A worker that speaks as a vLLM worker does, without a model: ``python -m kvrouter.sim``.

It has vLLM's block manager, prefix cache and continuous batching, and a timing model instead of a network, so that
a fleet of workers runs on one machine.  See ``docs/sim.md`` for what it models.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
from collections.abc import Callable, Sequence

from kvrouter._core import SimEngine, SimWorker

__all__ = ["SimEngine", "SimWorker", "main"]


def _count(text: str) -> int:
    value = int(text)
    if not 0 < value < 2**31:
        raise argparse.ArgumentTypeError(f"{text} is not from 1 to 2^31 - 1")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not zero or more")
    return value


def _range(first: int, last: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if not first <= value <= last:
            raise argparse.ArgumentTypeError(f"{text} is not from {first} to {last}")
        return value

    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kvrouter.sim",
        description="A simulated vLLM worker: OpenAI completions, KV events, load messages, metrics. Stops on Ctrl-C.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address of the HTTP server: a name or an IP address")
    add("--port", type=_range(0, 65535), default=8000, help="TCP port of the HTTP server; 0 takes a free one")
    add("--kv-events-endpoint", default="", help="ZMQ endpoint to publish KV events on, e.g. tcp://*:5557; '': none")
    add("--replay-endpoint", default="", help="ZMQ endpoint that replays past KV events, e.g. tcp://*:5757; '': none")
    add("--load-endpoint", default="", help="ZMQ endpoint to publish load messages on, e.g. tcp://*:5657; '': none")
    add("--topic", default="kv", help="topic of the KV events")
    add("--model", default="sim", help="name of the model, as requests give it")
    add("--block-size", type=_count, default=64, help="tokens in a KV-cache block")
    add("--num-blocks", type=_count, default=448, help="blocks in the KV cache; block 0 is never used")
    add("--max-num-seqs", type=_count, default=256, help="most requests in the batch")
    add("--max-num-batched-tokens", type=_count, default=2048, help="most tokens computed in one step")
    add("--max-model-len", type=_count, default=8192, help="most tokens of prompt and output together")
    add("--vocab-size", type=_count, default=1024, help="token ids are below this")
    add("--seed", type=_range(0, 2**64 - 1), default=0, help="seed of the engine's block hashes (not of the tokens)")
    add("--no-prefix-caching", dest="prefix_caching", action="store_false", help="reuse nothing")
    add("--event-layout", choices=("map", "array"), default="map", help="array: as vLLM up to 0.23 wrote events")
    add("--hash-type", choices=("int", "bytes"), default="int", help="block hashes as integers or strings of 32 bytes")
    add("--debug", action="store_true", help="serve GET /debug/blocks: the names of the blocks in the cache")
    add("--replay-buffer", type=_range(0, 2**30), default=10_000, help="batches kept for replay")
    add("--time-scale", type=_seconds, default=1.0, help="factor on all times; 0: no waiting at all")
    add("--step-s", type=_seconds, default=4e-3, help="seconds a step costs, whatever it computes")
    add("--prefill-token-s", type=_seconds, default=180e-6, help="seconds for each prompt token")
    add(
        "--attention-pair-s",
        type=_seconds,
        default=25e-9,
        help="seconds for each pair of a computed token and a token before it",
    )
    add(
        "--decode-sequence-s",
        type=_seconds,
        default=300e-6,
        help="seconds for each request that gets its next token",
    )
    return parser


def _as_flags(message: str) -> str:
    """The message with option names (``num_blocks``) as the flags that set them (``--num-blocks``)."""
    message = re.sub(r"^port: (.*)$", r"\1 (choose another --port)", message, flags=re.DOTALL)
    return re.sub(r"\b[a-z]+(?:_[a-z]+)+\b", lambda match: "--" + match[0].replace("_", "-"), message)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a worker until SIGINT or SIGTERM; returns the exit status (1: it could not start)."""
    options = vars(_parser().parse_args(argv))
    options["array_events"] = options.pop("event_layout") == "array"
    options["byte_hashes"] = options.pop("hash_type") == "bytes"
    # Blocked before the worker's threads start, so that they inherit it and the signals wait for sigwait().
    signals = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        worker = SimWorker(**options)
    except (RuntimeError, ValueError) as error:
        print(f"error: {_as_flags(str(error))}", file=sys.stderr)
        return 1
    with worker:
        host = f"[{options['host']}]" if ":" in options["host"] else options["host"]
        print(
            f"ready: http://{host}:{worker.port} model={options['model']}"
            f" kv_events={worker.kv_events_endpoint or 'off'}"
            f" replay={worker.replay_endpoint or 'off'} load={worker.load_endpoint or 'off'}",
            flush=True,
        )
        signal.sigwait(signals)
    return 0


if __name__ == "__main__":
    sys.exit(main())
