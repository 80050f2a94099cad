"""The command line of the Ray benchmark, made from ``RayBenchSettings``."""

from __future__ import annotations

from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

from kvrouter.bench.command import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    RichProgress,
    give_options,
    set_up_logging,
    terminate_like_interrupt,
)
from kvrouter.ray.bench.settings import RayBenchSettings


def bench_ray(**options: Any) -> None:
    """Rollouts on Ray under round robin and KV-aware routing, in one or all of the three ways in.

    Starts Ray (one node or several, all on this machine unless RAY_ADDRESS names a cluster) and an engine a GPU or
    worker, sends the same batches under both routings with the caches emptied in between, and reports hit rate (the
    engines' own), throughput, time to first token, latency, router latency, the spread over workers and nodes, and what
    a call costs to actors of the own node and of others.

    Exit status: 0; 1 if samples failed or something did not start; 2 for options that do not fit; 130 after Ctrl-C.
    """
    console = Console(stderr=True)
    settings = RayBenchSettings(**options)
    set_up_logging(settings.log_level.value, console)
    try:
        settings.validate()
        status = _run(settings, console)
    except ValueError as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}")
        raise typer.Exit(EXIT_USAGE) from None
    except RuntimeError as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}")
        raise typer.Exit(EXIT_FAILED) from None
    except KeyboardInterrupt:
        console.print("interrupted: Ray and the engines are stopped")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    if status:
        raise typer.Exit(status)


def _run(settings: RayBenchSettings, console: Console) -> int:
    try:
        from kvrouter.ray.bench.report import print_ray_report, write_ray_report
        from kvrouter.ray.bench.runner import run_ray_benchmark

        if settings.output is not None:
            import matplotlib  # noqa: F401 (say that it is missing before the run, not after)
    except ModuleNotFoundError as error:
        if error.name not in ("ray", "aiohttp", "matplotlib"):
            raise
        console.print(f"[bold red]error:[/] the benchmark needs {error.name}: pip install 'kvrouter\\[ray,bench]'")
        return EXIT_FAILED
    with terminate_like_interrupt(), RichProgress(console) as progress:
        result = run_ray_benchmark(settings, progress)
    print_ray_report(result, Console())
    if settings.output is not None:
        for path in write_ray_report(result, settings.output):
            console.print(f"written: {path}", highlight=False, soft_wrap=True)
    return EXIT_FAILED if result.failed else 0


give_options(bench_ray, RayBenchSettings)
