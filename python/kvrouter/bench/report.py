"""Results as a Rich table, as JSON, and as a folder of both with plots."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvrouter.bench.runner import ReportedResult, ReportedSettings, WorkloadResult

#: How modes are called where people read them.
MODE_LABELS = {"round_robin": "round robin", "kv_aware": "KV-aware"}


def print_report(result: ReportedResult, console: Console) -> None:
    """A table and a line of gains for each workload."""
    for workload in result.workloads:
        modes = workload.as_json()["modes"]
        console.print(f"[bold]{workload.workload}[/bold]: {_description(workload, result.settings)}", highlight=False)
        console.print(workload_table(workload))
        console.print(f"  KV-aware against round robin: {gain_line(modes['round_robin'], modes['kv_aware'])}")
        for line in _notes(workload, modes):
            console.print(f"  {line}")
        console.print()


def workload_table(workload: WorkloadResult) -> Table:
    """The figures of one workload, a column a mode; with repeats, medians and ``(min to max)``."""
    modes = workload.as_json()["modes"]
    table = Table()
    table.add_column("")
    for mode in modes:
        table.add_column(MODE_LABELS[mode], justify="right")

    def row(label: str, *keys: str, scale: float = 1.0, digits: int = 1) -> None:
        table.add_row(escape(label), *(_cell(figures, keys, scale, digits) for figures in modes.values()))

    row("hit rate [%]", "hit_rate", scale=100)
    row("requests/s", "requests_per_s", digits=2)
    row("generated tokens/s", "tokens_per_s")
    for name, key in (("TTFT", "ttft_ms"), ("latency", "latency_ms")):
        for point in ("p50", "p95", "p99"):
            row(f"{name} {point} [ms]", key, point, digits=0)
    for point in ("p50", "p99"):
        row(f"router {point} [µs]", "router_us", point, digits=0)
    table.add_row(
        "requests per worker",
        *(" / ".join(f"{count:g}" for count in figures["requests_per_worker"]) for figures in modes.values()),
    )
    for label, key in (("retried at another worker", "retried"), ("failed for good", "failed")):
        if any(figures[key] for figures in modes.values()):
            row(label, key, digits=0)
    return table


def gain_line(base: dict[str, Any], other: dict[str, Any]) -> str:
    """What `other` gains over `base`: hit rate in points, the rest in percent of `base`."""
    parts = []
    if base["hit_rate"] is not None and other["hit_rate"] is not None:
        parts.append(f"hit rate {(other['hit_rate'] - base['hit_rate']) * 100:+.1f} points")
    for label, keys in (
        ("throughput", ("requests_per_s",)),
        ("TTFT p50", ("ttft_ms", "p50")),
        ("latency p50", ("latency_ms", "p50")),
    ):
        old, new = _figure(base, keys), _figure(other, keys)
        if old and new is not None:
            parts.append(f"{label} {(new / old - 1) * 100:+.0f}%")
    return ", ".join(parts)


def write_report(result: ReportedResult, folder: Path) -> list[Path]:
    """Write ``results.json``, ``requests.jsonl`` (one line a request) and the plots; returns the paths."""
    from kvrouter.bench import plots

    folder.mkdir(parents=True, exist_ok=True)
    results = folder / "results.json"
    results.write_text(json.dumps(result.as_json(), indent=2, allow_nan=False) + "\n")
    requests = folder / "requests.jsonl"
    with requests.open("w") as lines:
        for workload in result.workloads:
            for mode, records in workload.records.items():
                for record in records:
                    lines.write(json.dumps({"workload": workload.workload, "mode": mode, **asdict(record)}) + "\n")
    return [results, requests, *plots.write_plots(result, folder)]


def _description(workload: WorkloadResult, settings: ReportedSettings) -> str:
    runs = next(iter(workload.runs.values()))
    parts = [
        f"{runs[0]['requests']} requests of {settings.seq_len} + {settings.generation_max_tokens} tokens",
        f"{settings.num_workers} {settings.engine.value} workers",
        settings.arrival,
    ]
    return ", ".join(parts)


def _notes(workload: WorkloadResult, modes: dict[str, Any]) -> list[str]:
    notes = []
    repeats = len(next(iter(workload.runs.values())))
    if repeats > 1:
        notes.append(f"medians of {repeats} runs each (least to greatest)")
    check = workload.prediction_check
    if check is not None and check["agreement"] is not None:
        notes.append(
            f"prediction check: overlap agrees with the worker's cached tokens on {check['agreement'] * 100:.1f}% of "
            f"{check['requests']} requests ({check['with_overlap']} with an overlap)"
        )
    for mode, figures in modes.items():
        lost = figures.get("workers_uncounted")
        if lost:
            notes.append(f"{MODE_LABELS[mode]}: the hit rate leaves out {lost:g} lost worker(s)")
        if figures["without_router"]:
            notes.append(f"{MODE_LABELS[mode]}: {figures['without_router']:g} requests were sent without the router")
    return notes


def _figure(figures: dict[str, Any], keys: tuple[str, ...]) -> float | None:
    value: Any = figures
    for key in keys:
        value = value[key]
    return None if value is None else float(value)


def _cell(figures: dict[str, Any], keys: tuple[str, ...], scale: float, digits: int) -> str:
    value = _figure(figures, keys)
    if value is None:
        return "-"
    text = f"{value * scale:,.{digits}f}"
    spread: Any = figures.get("spread")
    if spread is None:
        return text
    for key in keys:
        spread = spread[key]
    return f"{text} ({spread[0] * scale:,.{digits}f} to {spread[1] * scale:,.{digits}f})"
