"""The benchmark's command line, made from ``BenchSettings``: ``kvrouter bench`` and the example are this one function.

Only typer and rich are imported here; what is heavy comes when a run starts.
"""

from __future__ import annotations

import inspect
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from types import FrameType
from typing import Any, get_type_hints

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichBars

from kvrouter.bench.settings import BenchSettings

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 2, 130, 143


def bench(**options: Any) -> None:
    """Send the same requests under round robin and KV-aware routing, and compare.

    Starts workers and a router process, runs each workload under both modes with the caches emptied in between, and
    reports hit rate (by the workers' own counters), throughput, time to first token, latency and router latency.
    Everything it started is stopped at the end, on Ctrl-C too.

    Exit status: 0; 1 if requests failed for good or something did not start; 2 for options that do not fit;
    130 after Ctrl-C.
    """
    console = Console(stderr=True)
    settings = BenchSettings(**options)
    set_up_logging(settings.log_level.value, console)
    try:
        settings.validate()
        status = _run(settings, console)
    except ValueError as error:
        console.print(f"[bold red]error:[/] {_escape(error)}")
        raise typer.Exit(EXIT_USAGE) from None
    except RuntimeError as error:
        console.print(f"[bold red]error:[/] {_escape(error)}")
        raise typer.Exit(EXIT_FAILED) from None
    except KeyboardInterrupt:
        console.print("interrupted: workers and router are stopped")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    if status:
        raise typer.Exit(status)


def _run(settings: BenchSettings, console: Console) -> int:
    try:
        from kvrouter.bench.report import print_report, write_report
        from kvrouter.bench.runner import run_benchmark

        if settings.output is not None:
            import matplotlib  # noqa: F401 (say that it is missing before the run, not after)
    except ModuleNotFoundError as error:
        if error.name not in ("aiohttp", "matplotlib"):
            raise
        console.print(f"[bold red]error:[/] the benchmark needs {error.name}: pip install 'kvrouter\\[bench]'")
        return EXIT_FAILED
    with terminate_like_interrupt(), RichProgress(console) as progress:
        result = run_benchmark(settings, progress)
    out = Console()
    print_report(result, out)
    if settings.output is not None:
        for path in write_report(result, settings.output):
            console.print(f"written: {path}", highlight=False, soft_wrap=True)
    if result.failed:
        console.print(f"[bold red]{result.failed} requests failed for good[/]")
        return EXIT_FAILED
    return 0


def _escape(error: Exception) -> str:
    from rich.markup import escape

    return escape(str(error))


def set_up_logging(level: str, console: Console) -> None:
    """The package's log lines go to the console, from this level on."""
    package = logging.getLogger("kvrouter")
    package.setLevel(level)
    package.handlers = [RichHandler(console=console, show_path=False, markup=False, log_time_format="[%X]")]
    package.propagate = False


@contextmanager
def terminate_like_interrupt() -> Iterator[None]:
    """While this lasts, SIGTERM unwinds the stack as Ctrl-C does, so that what was started is stopped."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(_signal: int, _frame: FrameType | None) -> None:
        sys.exit(EXIT_TERMINATED)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class RichProgress:
    """``runner.Progress`` on a terminal: a spinner for what has no length, a bar for what has."""

    def __init__(self, console: Console) -> None:
        self._bars = RichBars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),
            console=console,
        )
        self._stage: Any = None

    def __enter__(self) -> RichProgress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end_stage()
        self._bars.stop()

    def stage(self, text: str) -> None:
        """Something that has no length begins; it ends with the next."""
        self._end_stage()
        self._stage = self._bars.add_task(text, total=None)

    @contextmanager
    def bar(self, text: str, total: int) -> Iterator[Callable[[], None]]:
        """Something of `total` steps begins."""
        self._end_stage()
        task = self._bars.add_task(text, total=total)
        yield lambda: self._bars.advance(task)

    def _end_stage(self) -> None:
        if self._stage is not None:
            self._bars.update(self._stage, total=1, completed=1)
            self._stage = None


def options_of(settings: type[Any]) -> list[inspect.Parameter]:
    """The fields of a settings dataclass as the parameters that Typer makes options of."""
    hints = get_type_hints(settings, include_extras=True)
    return [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(settings)
    ]


def give_options(command: Any, settings: type[Any]) -> None:
    """Typer reads a command's options from its signature: from now on they are the fields of ``settings``."""
    parameters = options_of(settings)
    command.__signature__ = inspect.Signature(parameters, return_annotation=None)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}


give_options(bench, BenchSettings)
