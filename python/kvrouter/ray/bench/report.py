"""The report of a Ray benchmark: a table a mode, and one that compares the modes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kvrouter.bench.report import MODE_LABELS, gain_line, workload_table, write_report
from kvrouter.bench.runner import WorkloadResult
from kvrouter.ray.bench.runner import RayBenchResult


def print_ray_report(result: RayBenchResult, console: Console) -> None:
    """A table and a line of gains for each mode, then the modes side by side."""
    settings = result.settings
    prefixes = f"{settings.prefixes} prefixes of {settings.shared_len} tokens" if settings.prefixes else "no prefixes"
    console.print(
        f"{settings.num_workers} {settings.engine.value} workers on {settings.num_nodes} node(s), {settings.arrival}, "
        f"{settings.num_iterations} iterations after {settings.warmup_iterations} of warm-up, {settings.seq_len} + "
        f"{settings.generation_max_tokens} tokens, {prefixes}",
        highlight=False,
    )
    for workload in result.workloads:
        modes = workload.as_json()["modes"]
        console.print(f"\n[bold]{workload.workload}[/bold]")
        console.print(_mode_table(workload, modes))
        console.print(f"  KV-aware against round robin: {gain_line(modes['round_robin'], modes['kv_aware'])}")
    if len(result.workloads) > 1:
        console.print("\n[bold]the modes compared[/bold], KV-aware")
        console.print(_comparison(result.workloads))


def write_ray_report(result: RayBenchResult, folder: Path) -> list[Path]:
    """Write ``results.json``, ``requests.jsonl`` (one line a sample) and the plots; returns the paths."""
    return write_report(result, folder)


def _mode_table(workload: WorkloadResult, modes: dict[str, Any]) -> Table:
    table = workload_table(workload)

    def row(label: str, text: Any) -> None:
        table.add_row(label, *(text(figures) for figures in modes.values()))

    row("prompt and generated tokens/s", lambda figures: f"{figures['all_tokens_per_s']:,.0f}")
    row("router, share of a request", lambda figures: _percent(figures["router_share_of_request"]))
    row("router, share of wall time", lambda figures: _percent(figures["router_share_of_wall"]))
    row("tokens, most of a worker over mean", lambda figures: _number(figures["imbalance"]))
    row("requests per node", lambda figures: " / ".join(f"{count:g}" for count in figures["requests_per_node"]))
    for place in ("local", "remote"):
        if any(figures["transit_ms"][place]["requests"] for figures in modes.values()):
            row(f"decision to actor, {place}, p50 / p99 [ms]", lambda figures: _transit(figures["transit_ms"], place))  # noqa: B023
    return table


def _comparison(workloads: list[WorkloadResult]) -> Table:
    table = Table()
    for column in ("", "hit rate", "requests/s", f"against {MODE_LABELS['round_robin']}", "TTFT p50", "router p50"):
        table.add_column(column, justify="right" if column else "left")
    for workload in workloads:
        modes = workload.as_json()["modes"]
        own, base = modes["kv_aware"], modes["round_robin"]
        table.add_row(
            workload.workload,
            _percent(own["hit_rate"]),
            f"{own['requests_per_s']:.2f}",
            f"{(own['requests_per_s'] / base['requests_per_s'] - 1) * 100:+.0f}%",
            f"{own['ttft_ms']['p50']:,.0f} ms",
            f"{own['router_us']['p50']:,.0f} µs",
        )
    return table


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.3g}%"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _transit(transit: dict[str, Any], place: str) -> str:
    figures = transit[place]
    return "-" if figures["p50"] is None else f"{figures['p50']:.2f} / {figures['p99']:.2f}"
