"""Every option of the Ray benchmark, defined once; ``command.py`` makes the command line of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from kvrouter.bench.settings import EngineName, LogLevel
from kvrouter.bench.workloads import thrash_num_prefixes

TINY_VOCAB_SIZE = 1024
_CLUSTER, _WORK, _ROUTING, _REPORT = "Cluster", "Work", "Routing", "Runs and reports"


class Integration(str, Enum):
    """The three ways in; see docs/ray.md."""

    SIMPLE = "simple"
    MANUAL = "manual"
    INTEGRATED = "integrated"


def _option(panel: str, text: str, **extra: Any) -> Any:
    return typer.Option(help=text, rich_help_panel=panel, **extra)


@dataclass(frozen=True)
class RayBenchSettings:
    """Options of one run; ``validate`` says what does not fit together, naming the flag to change.

    Lengths are in tokens, ``num_blocks`` in KV-cache blocks of ``block_size`` tokens, times in seconds.
    """

    engine: Annotated[EngineName, _option(_CLUSTER, "Real vLLM engines, or the simulated one (no model).")] = (
        EngineName.VLLM
    )
    num_nodes: Annotated[
        int,
        _option(
            _CLUSTER,
            "Nodes. Without a running Ray cluster (RAY_ADDRESS) they are made on this machine, each with a raylet of "
            "its own.",
            min=1,
        ),
    ] = 1
    gpus_per_node: Annotated[
        int, _option(_CLUSTER, "GPUs of each node, or workers where there are none: one engine each.", min=1)
    ] = 2
    model: Annotated[
        str | None,
        _option(_CLUSTER, "Model that vLLM serves. Default: a small one with random weights, made here."),
    ] = None
    tensor_parallel_size: Annotated[int, _option(_CLUSTER, "GPUs (or cores) of one engine.", min=1)] = 1
    num_blocks: Annotated[
        int | None,
        _option(
            _CLUSTER,
            "KV-cache blocks of each worker. Default: 448 (small, so that caches fill within a run); with --model as "
            "many as its memory holds.",
            min=8,
        ),
    ] = None
    max_num_seqs: Annotated[
        int | None,
        _option(_CLUSTER, "Requests that an engine runs at once. Default: 4; with --model vLLM's own default.", min=1),
    ] = None
    block_size: Annotated[int, _option(_CLUSTER, "Tokens in a KV-cache block.", min=1)] = 64
    vocab_size: Annotated[int, _option(_CLUSTER, "Prompts are random token ids in [3, this).", min=16)] = 1024
    time_scale: Annotated[float, _option(_CLUSTER, "Simulated engine: its times are multiplied by this.", min=0.0)] = (
        1.0
    )
    base_kv_events_port: Annotated[
        int, _option(_CLUSTER, "Worker N publishes KV events on this + N, if that port is free.")
    ] = 5557
    base_metrics_port: Annotated[
        int, _option(_CLUSTER, "Worker N publishes its load on this + N, if that port is free.")
    ] = 5657

    batch_size: Annotated[int, _option(_WORK, "Samples of each iteration, generations included.", min=1)] = 64
    seq_len: Annotated[int, _option(_WORK, "Tokens in each prompt.", min=1)] = 1600
    prefix_len: Annotated[
        int | None, _option(_WORK, "Tokens that prompts share. Default: 96% of --seq-len, in whole blocks.", min=1)
    ] = None
    num_prefixes: Annotated[
        int | None,
        _option(
            _WORK,
            "Distinct prefixes; 0: no prompt shares anything. Default: as many as fill 6/7 of the fleet's caches, far "
            "more than one worker's.",
            min=0,
        ),
    ] = None
    num_generations_per_prompt: Annotated[int, _option(_WORK, "Samples of each prompt, as in GRPO.", min=1)] = 1
    num_iterations: Annotated[int, _option(_WORK, "Iterations that count.", min=1)] = 5
    warmup_iterations: Annotated[int, _option(_WORK, "Iterations before them that do not.", min=0)] = 1
    shuffle: Annotated[bool, _option(_WORK, "Shuffle the samples of each batch.")] = False
    sequential: Annotated[bool, _option(_WORK, "One sample after the other instead of a batch at once.")] = False
    generation_max_tokens: Annotated[int, _option(_WORK, "Tokens generated for each sample, exactly.", min=1)] = 16
    seed: Annotated[int, _option(_WORK, "Seed of prompts and orders.", min=0)] = 42

    use_manual_routing: Annotated[
        bool, _option(_ROUTING, "Manual mode: VllmGeneration and a KvRouter of one's own.")
    ] = False
    use_integrated_routing: Annotated[bool, _option(_ROUTING, "Integrated mode: RoutedVllmWorkerGroup.")] = False
    compare_modes: Annotated[bool, _option(_ROUTING, "All three modes, one after the other.")] = False
    policy: Annotated[str, _option(_ROUTING, "The router's policy in the KV-aware runs.")] = "linear"

    repeats: Annotated[
        int, _option(_REPORT, "Runs of each, the order of the two routings alternating; medians count.", min=1)
    ] = 1
    output: Annotated[Path | None, _option(_REPORT, "Folder for results.json, requests.jsonl and PNG plots.")] = None
    log_level: Annotated[LogLevel, _option(_REPORT, "What is logged during the run.", case_sensitive=False)] = (
        LogLevel.ERROR
    )

    def validate(self) -> None:
        """Check what single options cannot know of each other.

        Raises:
            ValueError: what does not fit, and the flag to change.
        """
        if self.use_manual_routing + self.use_integrated_routing + self.compare_modes > 1:
            raise ValueError("give one of --use-manual-routing, --use-integrated-routing and --compare-modes")
        if self.batch_size % self.num_generations_per_prompt:
            raise ValueError(
                f"--batch-size {self.batch_size} is no multiple of --num-generations-per-prompt "
                f"{self.num_generations_per_prompt}"
            )
        if self.gpus_per_node % self.tensor_parallel_size:
            raise ValueError(
                f"--gpus-per-node {self.gpus_per_node} is no multiple of --tensor-parallel-size "
                f"{self.tensor_parallel_size}"
            )
        blocks, needed = self.blocks, -(-self.max_model_len // self.block_size)
        if blocks is not None and needed >= blocks:
            raise ValueError(
                f"one request takes {needed} blocks and a worker has {blocks}: raise --num-blocks, or lower --seq-len "
                "or --generation-max-tokens"
            )
        if self.engine is EngineName.VLLM and self.model is None and self.vocab_size > TINY_VOCAB_SIZE:
            raise ValueError(f"--vocab-size {self.vocab_size}: the built-in model has {TINY_VOCAB_SIZE} tokens")
        if self.num_prefixes != 0:
            if not self.block_size <= self.shared_len < self.seq_len:
                raise ValueError(
                    f"--prefix-len {self.shared_len} must be from --block-size {self.block_size} to --seq-len "
                    f"{self.seq_len} - 1; --num-prefixes 0 shares nothing"
                )
            if self.num_prefixes is None and blocks is None:
                raise ValueError("--num-prefixes has a default only with --num-blocks: give one of the two")

    @property
    def integrations(self) -> list[Integration]:
        """The modes of this run, in order."""
        if self.compare_modes:
            return list(Integration)
        if self.use_manual_routing:
            return [Integration.MANUAL]
        return [Integration.INTEGRATED] if self.use_integrated_routing else [Integration.SIMPLE]

    @property
    def num_workers(self) -> int:
        """Engines of all nodes."""
        return self.num_nodes * self.gpus_per_node // self.tensor_parallel_size

    @property
    def blocks(self) -> int | None:
        """KV-cache blocks of a worker; None: as many as it has memory for."""
        if self.num_blocks is not None:
            return self.num_blocks
        return 448 if self.model is None else None

    @property
    def shared_len(self) -> int:
        """Tokens that prompts share."""
        if self.prefix_len is not None:
            return self.prefix_len
        return self.seq_len * 24 // 25 // self.block_size * self.block_size

    @property
    def prefixes(self) -> int:
        """Distinct prefixes; 0: nothing is shared.  REQUIRES: ``validate`` has passed."""
        if self.num_prefixes is not None:
            return self.num_prefixes
        assert self.blocks is not None
        return thrash_num_prefixes(self.blocks, self.num_workers, self.block_size, self.shared_len)

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and answer, in whole blocks."""
        tokens = self.seq_len + self.generation_max_tokens
        return -(-tokens // self.block_size) * self.block_size

    @property
    def arrival(self) -> str:
        """How samples arrive, in two words."""
        return "one sample at a time" if self.sequential else f"batches of {self.batch_size}"

    def as_json(self) -> dict[str, Any]:
        """The settings as JSON values, with what follows from them; paths are left out."""
        values = asdict(self)
        del values["output"]
        values |= {"num_workers": self.num_workers, "prefix_len": self.shared_len, "num_prefixes": self.prefixes}
        return {key: value.value if isinstance(value, Enum) else value for key, value in values.items()}
