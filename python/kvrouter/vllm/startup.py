"""What a user sees while workers start, and when one does not."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

# What a log says, and what to change then.  The first that is found counts.
_HINTS = (
    (r"unrecognized arguments|invalid choice|expected one argument", "extra_args: the engine refuses an argument"),
    (r"Address already in use|address in use", "a port: base_http_port, base_kv_events_port or base_metrics_port"),
    (r"No module named '?vllm", "vLLM is not installed here: run scripts/install_vllm.py"),
    (r"No module named '?kvrouter", "kvrouter is not installed here: pip install ."),
    (r"No available memory for the cache blocks|larger than the (available KV cache|maximum number of tokens)|"
     r"KV cache is needed|estimated maximum model length",
     "max_model_len is too high, or num_gpu_blocks or VLLM_CPU_KVCACHE_SPACE (env) too low"),
    (r"out of memory|OutOfMemory|Cannot allocate memory|is less than desired (GPU|CPU) memory|bad_alloc",
     "memory: fewer workers, a smaller model, or less VLLM_CPU_KVCACHE_SPACE (env)"),
    (r"block.size", "block_size"),
    (r"max.model.len|max_position_embeddings", "max_model_len"),
    (r"is not a (local folder|valid model)|Can't load (the )?(config|tokenizer)|OfflineMode|LocalEntryNotFound",
     "model: it is neither a folder nor a model that can be downloaded"),
)  # fmt: skip


def likely_setting(exit_code: int | None, log_tail: str) -> str | None:
    """What to change, judged by how a worker ended; None when nothing points to it."""
    for pattern, hint in _HINTS:
        if re.search(pattern, log_tail, re.IGNORECASE):
            return hint
    if exit_code == -signal.SIGKILL:
        return "memory: the system may have killed it; fewer workers, or less VLLM_CPU_KVCACHE_SPACE (env)"
    return None


def failure_message(index: int, exit_code: int | None, log_tail: str, log_path: Path) -> str:
    """The text of the error for a worker that ended while it started."""
    if exit_code is not None and exit_code < 0:
        how = f"was ended by {signal.Signals(-exit_code).name}"
    else:
        how = f"ended with exit code {exit_code}"
    hint = likely_setting(exit_code, log_tail)
    likely = f"\nLikely: {hint}" if hint else ""
    tail = "\n".join(f"  | {line}" for line in log_tail.splitlines()[-25:])
    return f"worker {index} {how} while it started.{likely}\nThe end of its log ({log_path}):\n{tail}"


class StartupProgress:
    """A line on standard error with the workers that are healthy and the seconds gone; without a terminal, two lines.

    Parameters
    ----------
    engine
        Name of the engine, for the text.
    num_workers
        How many workers are waited for.
    enabled
        False shows nothing.
    """

    def __init__(self, engine: str, num_workers: int, enabled: bool = True) -> None:
        self._console = Console(stderr=True)
        self._text = f"starting {num_workers} {engine} worker{'s' if num_workers != 1 else ''}"
        self._num_workers = num_workers
        self._enabled = enabled
        self._healthy = 0
        self._started = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> StartupProgress:
        self._started = time.monotonic()
        if self._enabled and self._console.is_terminal:
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("healthy"),
                TimeElapsedColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task(self._text, total=self._num_workers)
            self._bar.start()
        elif self._enabled:
            self._console.print(f"{self._text} ...", highlight=False)
        return self

    def update(self, healthy: int) -> None:
        """Shows that ``healthy`` workers answer."""
        self._healthy = healthy
        if self._bar is not None:
            self._bar.update(self._task, completed=healthy)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._enabled:
            seconds = time.monotonic() - self._started
            self._console.print(
                f"{self._text}: {self._healthy} of {self._num_workers} healthy after {seconds:.1f} s", highlight=False
            )
