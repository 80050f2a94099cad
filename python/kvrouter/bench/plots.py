"""Plots of a run as PNG files: one picture a question, readable in print and by the colour-blind.

Figures are made without pyplot: no global state, and no display is needed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from kvrouter.bench.client import RequestRecord
from kvrouter.bench.plot_style import PLOT_STYLE
from kvrouter.bench.report import MODE_LABELS
from kvrouter.bench.runner import ReportedResult, WorkloadResult
from kvrouter.bench.stats import ecdf

#: Of Okabe and Ito's palette: apart in every common form of colour blindness, and in grey.
COLORS = {"round_robin": "#E69F00", "kv_aware": "#0072B2"}
LINES = {"round_robin": "--", "kv_aware": "-"}


def write_plots(result: ReportedResult, folder: Path) -> list[Path]:
    """Write the plots of all workloads to `folder`; returns their paths."""
    plots: dict[str, Callable[[ReportedResult], Figure]] = {
        "hit_rate.png": plot_hit_rate,
        "throughput.png": plot_throughput,
        "ttft.png": plot_ttft,
        "router_latency.png": plot_router_latency,
        "requests_per_worker.png": plot_requests_per_worker,
    }
    paths = []
    with mpl.rc_context(PLOT_STYLE):
        for name, plot in plots.items():
            path = folder / name
            plot(result).savefig(path, dpi=140, format="png")
            paths.append(path)
    return paths


def plot_hit_rate(result: ReportedResult) -> Figure:
    """Bars: share of prompt tokens that the workers took from their caches."""
    figure, axes = _bars(result, lambda figures: _scaled(figures["hit_rate"], 100), "{:.0f}%")
    axes.set(title="Prefix-cache hit rate", ylabel="prompt tokens from cache [%]")
    axes.set_ylim(0, 108)
    axes.set_yticks(range(0, 101, 20))
    return figure


def plot_throughput(result: ReportedResult) -> Figure:
    """Bars: requests answered a second."""
    figure, axes = _bars(result, lambda figures: figures["requests_per_s"], "{:.1f}")
    axes.set(title=f"Throughput with {_users(result)}", ylabel="requests/s")
    axes.margins(y=0.12)
    return figure


def plot_ttft(result: ReportedResult) -> Figure:
    """Curves: the share of requests that had their first token by a time, a panel a workload."""
    title = f"Time to first token, routing included, {_users(result)}"
    return _distributions(result, title, "time to first token", "ms", lambda record: record.ttft_ms)


def plot_router_latency(result: ReportedResult) -> Figure:
    """Curves: the share of decisions (hashing and HTTP) done by a time, a panel a workload."""
    title = "Router latency: from the prompt in hand to the worker's number"
    return _distributions(result, title, "router latency", "µs", lambda record: record.router_us)


def plot_requests_per_worker(result: ReportedResult) -> Figure:
    """Stacked bars: how each mode spread the requests over the workers."""
    workloads = result.workloads
    figure = Figure(figsize=(max(6.0, 2.2 * len(workloads) + 2), 4.2), layout="constrained")
    axes = figure.add_subplot()
    shades = {"round_robin": ("#E69F00", "#F7D794"), "kv_aware": ("#0072B2", "#7FB8DE")}
    labels = []
    for position, (workload, mode, figures) in enumerate(_each_mode(workloads)):
        x = position + 0.4 * (position // len(shades))
        labels.append((x, f"{workload.workload}\n{MODE_LABELS[mode]}"))
        bottom = 0.0
        for worker, count in enumerate(figures["requests_per_worker"]):
            axes.bar(x, count, 0.75, bottom=bottom, color=shades[mode][worker % 2], edgecolor="white", linewidth=1.2)
            if count > 0.06 * sum(figures["requests_per_worker"]):
                color = "white" if mode == "kv_aware" and worker % 2 == 0 else "black"
                middle = (x, bottom + count / 2)
                axes.annotate(f"worker {worker}\n{count:g}", middle, ha="center", va="center", size=8, color=color)
            bottom += count
    axes.set_xticks([x for x, _ in labels], [text for _, text in labels], fontsize=9)
    axes.tick_params(axis="x", length=0)
    axes.set(title="Requests per worker", ylabel="requests")
    return figure


def _bars(result: ReportedResult, value: Callable[[dict[str, Any]], float | None], label: str) -> tuple[Figure, Axes]:
    """Grouped bars, a group a workload and a bar a mode; with repeats, whiskers from the least to the greatest."""
    workloads = result.workloads
    figure = Figure(figsize=(max(6.0, 1.7 * len(workloads) + 2.4), 4.2), layout="constrained")
    axes = figure.add_subplot()
    width = 0.38
    for order, mode in enumerate(MODE_LABELS):
        axes.bar(0, 0, color=COLORS[mode], label=MODE_LABELS[mode])
        offset = (order - 0.5) * (width + 0.02)
        for position, workload in enumerate(workloads):
            height = value(workload.as_json()["modes"][mode])
            if height is None:
                continue
            runs = [run for run in map(value, workload.runs[mode]) if run is not None]
            reach = [[height - min(runs)], [max(runs) - height]] if len(runs) > 1 else None
            bar = axes.bar(
                position + offset,
                height,
                width,
                color=COLORS[mode],
                yerr=reach,
                error_kw={"ecolor": "#333333", "elinewidth": 1.2, "capsize": 3},
            )
            axes.bar_label(bar, [label.format(height)], padding=3, fontsize=10)
    axes.set_xticks(range(len(workloads)), [workload.workload for workload in workloads])
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.6, len(workloads) - 0.4)
    figure.legend(loc="outside lower center", ncols=2)
    return figure, axes


def _distributions(
    result: ReportedResult, title: str, quantity: str, unit: str, value: Callable[[RequestRecord], float | None]
) -> Figure:
    count = len(result.workloads)
    columns = min(count, 2)
    rows = -(-count // columns)
    figure = Figure(figsize=(7.0 if columns == 1 else 10.0, 0.9 + 3.3 * rows), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", weight="bold", fontsize=12)
    for position, workload in enumerate(result.workloads):
        axes = figure.add_subplot(rows, columns, position + 1)
        for mode, records in workload.records.items():
            values = [number for number in map(value, records) if number is not None]
            if values:
                x, share = ecdf(values)
                style: dict[str, Any] = {"color": COLORS[mode], "linestyle": LINES[mode], "linewidth": 2.0}
                label = f"{MODE_LABELS[mode]}, p50 {statistics.median(values):,.0f} {unit}"
                axes.step(x, [100 * part for part in share], where="post", label=label, **style)
        _scale_x(axes)
        axes.grid(True, axis="x")
        axes.set_ylim(0, 101)
        axes.set(xlabel=f"{quantity} [{unit}]", ylabel="requests [%]")
        axes.set_title(workload.workload, pad=22)
        if axes.get_legend_handles_labels()[0]:
            legend = axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 0.99), ncols=2, fontsize=9, borderaxespad=0.2)
            # A long legend would make its panel narrower than the others.
            legend.set_in_layout(False)
    return figure


def _scale_x(axes: Axes) -> None:
    """Logarithmic where values differ by more than a factor of 5: a long tail would squeeze all else to the left."""
    values = [float(x) for line in axes.lines for x in np.asarray(line.get_xdata())]
    if values and 0 < 5 * min(values) < max(values):
        axes.set_xscale("log")
        few = max(values) > 40 * min(values)
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if few else (1.0, 2.0, 5.0)))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def _each_mode(workloads: Iterable[WorkloadResult]) -> Iterable[tuple[WorkloadResult, str, dict[str, Any]]]:
    for workload in workloads:
        for mode, figures in workload.as_json()["modes"].items():
            yield workload, mode, figures


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _users(result: ReportedResult) -> str:
    settings = result.settings
    return f"{settings.arrival} and {settings.num_workers} {settings.engine.value} workers"
