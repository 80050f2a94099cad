"""Every option of a benchmark run, defined once.

``BenchSettings`` is an ordinary dataclass for use from Python; the ``typer.Option`` beside each field is what the
command line shows (see ``command.py``).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

#: The smallest token id a workload uses: 0 to 2 are the special tokens of the built-in model.
FIRST_TOKEN_ID = 3

_WORKERS, _WORK, _ROUTER, _REPORT = "Workers", "Work", "Router", "Runs and reports"


class EngineName(str, Enum):
    """What a worker is: a real vLLM server, or the simulated one."""

    VLLM = "vllm"
    SIM = "sim"


class WorkloadName(str, Enum):
    """The workloads of ``workloads.py``, or all of them in turn."""

    SHARED = "shared"
    THRASH = "thrash"
    GROUP = "group"
    UNIQUE = "unique"
    ALL = "all"


class LogLevel(str, Enum):
    """How much is logged while a run is under way."""

    DEBUG = "DEBUG"
    INFO = "INFO"
    WARNING = "WARNING"
    ERROR = "ERROR"


def _option(panel: str, text: str, **extra: Any) -> Any:
    return typer.Option(help=text, rich_help_panel=panel, **extra)


@dataclass(frozen=True)
class BenchSettings:
    """Options of one run; ``validate`` says what does not fit together, naming the flag to change.

    Lengths are in tokens, ``num_blocks`` in KV-cache blocks of ``block_size`` tokens, times in seconds.
    """

    engine: Annotated[
        EngineName, _option(_WORKERS, "Real vLLM servers, or the simulated worker (no model, starts in a second).")
    ] = EngineName.VLLM
    num_workers: Annotated[int, _option(_WORKERS, "Workers to start.", min=1)] = 2
    model: Annotated[
        str | None,
        _option(
            _WORKERS, "Model that vLLM serves. Default: a small one with random weights, made here, not downloaded."
        ),
    ] = None
    num_blocks: Annotated[
        int,
        _option(_WORKERS, "KV-cache blocks of each worker: small on purpose, so that caches fill within a run.", min=8),
    ] = 448
    block_size: Annotated[
        int, _option(_WORKERS, "Tokens in a KV-cache block, for workers and router alike.", min=1)
    ] = 64
    vocab_size: Annotated[
        int,
        _option(_WORKERS, "Prompts are random token ids in [3, this). Keep within the model's vocabulary.", min=16),
    ] = 1024
    time_scale: Annotated[
        float,
        _option(_WORKERS, "Simulated worker: its times are multiplied by this (0.1: ten times as fast).", min=0.0),
    ] = 1.0
    base_kv_events_port: Annotated[
        int | None, _option(_WORKERS, "Worker N publishes KV events on this + N. Default: free ports.")
    ] = None
    base_metrics_port: Annotated[
        int | None, _option(_WORKERS, "Worker N publishes its load on this + N. Default: free ports.")
    ] = None

    workload: Annotated[
        WorkloadName,
        _option(
            _WORK,
            "shared: a few prefixes, many requests each. thrash: prefixes that fit the fleet's caches but not one "
            "worker's. group: several samples of each prompt, as in GRPO. unique: nothing shared.",
        ),
    ] = WorkloadName.THRASH
    num_requests: Annotated[
        int | None, _option(_WORK, "Requests of each workload and mode. Default: depends on the workload.", min=1)
    ] = None
    batch_size: Annotated[
        int | None, _option(_WORK, "With --num-iterations, another way to say --num-requests: their product.", min=1)
    ] = None
    num_iterations: Annotated[int | None, _option(_WORK, "See --batch-size.", min=1)] = None
    seq_len: Annotated[int, _option(_WORK, "Tokens in each prompt.", min=1)] = 1600
    prefix_len: Annotated[
        int, _option(_WORK, "shared and thrash: tokens of each prompt that are shared with others.", min=1)
    ] = 1536
    num_prefixes: Annotated[
        int | None,
        _option(
            _WORK,
            "shared and thrash: distinct prefixes. Default: 4 for shared; for thrash as many as fill 6/7 of the "
            "fleet's caches.",
            min=1,
        ),
    ] = None
    group_size: Annotated[int, _option(_WORK, "group: samples of each prompt.", min=1)] = 8
    generation_max_tokens: Annotated[int, _option(_WORK, "Tokens generated for each request, exactly.", min=1)] = 16
    generation_temperature: Annotated[
        float | None,
        _option(_WORK, "Sampling temperature. Default: 0, and 1 for group, whose samples should differ.", min=0.0),
    ] = None
    concurrency: Annotated[
        int, _option(_WORK, "Users; each sends its next request when the last one is answered.", min=1)
    ] = 4
    request_timeout: Annotated[
        float, _option(_WORK, "Seconds until a worker that does not answer counts as failed.", min=0.001)
    ] = 120.0
    seed: Annotated[int, _option(_WORK, "Seed of prompts, orders, sampling and the router's tie-breaks.", min=0)] = 42

    router_host: Annotated[str, _option(_ROUTER, "Address that the router process listens on.")] = "127.0.0.1"
    router_port: Annotated[
        int, _option(_ROUTER, "Port that the router process listens on; 0: any free one.", min=0, max=65535)
    ] = 7000
    router_timeout: Annotated[
        float,
        _option(_ROUTER, "Seconds until a router that does not answer is done without (round robin).", min=0.001),
    ] = 1.0
    router_startup_wait: Annotated[
        float, _option(_ROUTER, "Seconds that the router process may take to start and to see every worker.", min=0.1)
    ] = 30.0
    policy: Annotated[str, _option(_ROUTER, "The router's policy in the KV-aware mode.")] = "linear"

    repeats: Annotated[
        int,
        _option(_REPORT, "Runs of every workload and mode, the order of the modes alternating; medians count.", min=1),
    ] = 1
    check_prediction: Annotated[
        bool,
        _option(
            _REPORT,
            "One more pass per workload, a request at a time: does the overlap that the router predicts agree with the "
            "tokens that the worker took from its cache, once its events are in?",
        ),
    ] = False
    output: Annotated[
        Path | None, _option(_REPORT, "Folder for results.json, requests.jsonl, PNG plots and the workers' logs.")
    ] = None
    log_level: Annotated[LogLevel, _option(_REPORT, "What is logged during the run.", case_sensitive=False)] = (
        LogLevel.WARNING
    )

    def validate(self) -> None:
        """Check what single options cannot know of each other.

        Raises:
            ValueError: what does not fit, and the flag to change.
        """
        if (self.batch_size is None) != (self.num_iterations is None):
            raise ValueError("--batch-size and --num-iterations go together (their product is the number of requests)")
        if self.num_requests is not None and self.batch_size is not None:
            raise ValueError("--num-requests already says it: leave out --batch-size and --num-iterations")
        request_blocks = -(-(self.seq_len + self.generation_max_tokens) // self.block_size)
        if request_blocks >= self.num_blocks:
            raise ValueError(
                f"one request takes {request_blocks} blocks and a worker has {self.num_blocks}: raise --num-blocks, or "
                "lower --seq-len or --generation-max-tokens"
            )
        if self.has_prefixes:
            if self.prefix_len >= self.seq_len:
                raise ValueError(
                    f"--prefix-len {self.prefix_len} leaves a prompt of --seq-len {self.seq_len} no tokens of its own"
                )
            if self.prefix_len < self.block_size:
                raise ValueError(
                    f"--prefix-len {self.prefix_len} is less than a block of {self.block_size}: nothing could be shared"
                )
        for flag, base in (
            ("--base-kv-events-port", self.base_kv_events_port),
            ("--base-metrics-port", self.base_metrics_port),
        ):
            if base is not None and not 1 <= base <= 65536 - self.num_workers:
                raise ValueError(f"{flag} {base}: ports {base} to {base + self.num_workers - 1} must be in 1..65535")
        kv, load = self.base_kv_events_port, self.base_metrics_port
        if kv is not None and load is not None and abs(kv - load) < self.num_workers:
            raise ValueError(
                f"--base-kv-events-port {kv} and --base-metrics-port {load} overlap for {self.num_workers} workers"
            )

    @property
    def has_prefixes(self) -> bool:
        """Whether a workload of this run uses ``prefix_len``."""
        return self.workload in (WorkloadName.SHARED, WorkloadName.THRASH, WorkloadName.ALL)

    @property
    def max_model_len(self) -> int:
        """Tokens that a worker must accept: prompt and answer, in whole blocks."""
        tokens = self.seq_len + self.generation_max_tokens
        return -(-tokens // self.block_size) * self.block_size

    @property
    def arrival(self) -> str:
        """How requests arrive, in two words."""
        return f"{self.concurrency} user{'s' if self.concurrency > 1 else ''}"

    def requests_for(self, default: int) -> int:
        """How many requests a workload sends, `default` being its own answer."""
        if self.batch_size is not None and self.num_iterations is not None:
            return self.batch_size * self.num_iterations
        return self.num_requests if self.num_requests is not None else default

    def as_json(self) -> dict[str, Any]:
        """The settings as JSON values; paths are left out."""
        values = asdict(self)
        del values["output"]
        return {key: value.value if isinstance(value, Enum) else value for key, value in values.items()}
