"""Plots of the results as PNG files, readable in print and by the colour-blind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from harness.summary import median
from harness.targets import CONCURRENT, OURS, RADIX
from kvrouter.bench.plot_style import PLOT_STYLE

#: Of Okabe and Ito's palette.
COLORS = {OURS: "#0072B2", RADIX: "#999999", CONCURRENT: "#E69F00"}
VARIANT_STYLES = {
    "best_worker, int32 array": ("#0072B2", "-", "o"),
    "best_worker, int64 array": ("#56B4E9", "-", "s"),
    "best_worker, list": ("#009E73", "--", "^"),
    "route, int32 array": ("#CC79A7", "--", "v"),
    "reference, list": ("#E69F00", "-", "D"),
}


def write_plots(results: dict[str, Any], folder: Path) -> list[str]:
    """Writes the plots that the results allow; returns their names."""
    plots: dict[str, Callable[[dict[str, Any]], Figure | None]] = {
        "index.png": plot_index,
        "beside_a_writer.png": plot_beside_a_writer,
        "decision.png": plot_decision,
    }
    names = []
    with mpl.rc_context(PLOT_STYLE):
        for name, plot in plots.items():
            figure = plot(results)
            if figure is not None:
                figure.savefig(folder / name, dpi=130, format="png")
                names.append(name)
    return names


def plot_index(results: dict[str, Any]) -> Figure:
    """Bars: throughput of events and finds, tail latency and memory, by stream and index."""
    figure = Figure(figsize=(14, 9), layout="constrained")
    panels = (
        ("event_blocks_per_s", "Events: more is better", "blocks/s [millions]", 1e6),
        ("find_per_s", "Finds: more is better", "finds/s [millions]", 1e6),
        ("find_p99_ns", "Find p99: less is better", "us", 1e3),
        ("rss_bytes", "Memory of the index: less is better", "MB", 1e6),
    )
    for position, (key, title, unit, scale) in enumerate(panels):
        axes = figure.add_subplot(2, 2, position + 1)
        _bars(axes, results["streams"], lambda record, key=key, scale=scale: _scaled(record, key, scale))  # type: ignore[misc]
        axes.set(title=title, ylabel=unit)
    _legend(figure, [OURS, RADIX, CONCURRENT], results["streams"])
    return figure


def plot_beside_a_writer(results: dict[str, Any]) -> Figure | None:
    """Bars: find p99 beside a writer, with a line across at that of the quiet reader."""
    key = "find_p99_ns_under_write"
    streams = [stream for stream in results["streams"] if key in stream["peers"][OURS]]
    if not streams:
        return None
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    axes = figure.add_subplot()
    _bars(
        axes,
        streams,
        lambda record: _scaled(record, key, 1e3),
        mark=lambda record: median(record, "find_p99_ns_quiet") / 1e3,
    )
    axes.set(title="Find p99 beside a writer at full speed (black line: without it)", ylabel="us")
    _legend(figure, [OURS, CONCURRENT], streams)
    return figure


def plot_decision(results: dict[str, Any]) -> Figure:
    """Lines: the time of a decision over the number of workers."""
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.add_subplot()
    rows = results["decision"]
    for variant, (color, line, marker) in VARIANT_STYLES.items():
        of_variant = [row for row in rows if row["variant"] == variant]
        if not of_variant:
            continue
        x = [row["workers"] for row in of_variant]
        p50 = [median(row, "p50_us") for row in of_variant]
        axes.plot(x, p50, color=color, linestyle=line, marker=marker, label=variant)
        axes.plot(x, [median(row, "p99_us") for row in of_variant], color=color, linestyle=":", linewidth=1.2)
    axes.set_xscale("log", base=2)
    _log_scale(axes)
    workers = sorted({row["workers"] for row in rows})
    axes.set_xticks(workers, [str(count) for count in workers])
    axes.set(title="From 2,048 tokens to a worker, in Python (p50; dotted: p99)", xlabel="workers", ylabel="us")
    axes.legend(loc="upper left", fontsize=9, ncols=2)
    axes.set_ylim(top=axes.get_ylim()[1] * 3)  # room for the legend
    return figure


def _scaled(record: dict[str, Any], key: str, scale: float) -> tuple[float, float, float] | None:
    """Median, least and greatest."""
    if key not in record:
        return None
    return record[key]["median"] / scale, record[key]["min"] / scale, record[key]["max"] / scale


def _bars(
    axes: Axes,
    streams: Sequence[dict[str, Any]],
    value: Callable[[dict[str, Any]], tuple[float, float, float] | None],
    mark: Callable[[dict[str, Any]], float] | None = None,
) -> None:
    """A group a stream, a bar an index, on a logarithmic scale; whiskers from the least to the greatest run."""
    spreads = {
        (peer, position): spread
        for peer in COLORS
        for position, stream in enumerate(streams)
        if peer in stream["peers"] and (spread := value(stream["peers"][peer])) is not None
    }
    peers = [peer for peer in COLORS if any(peer == other for other, _ in spreads)]
    width = 0.84 / len(peers)
    for (peer, position), (height, least, greatest) in spreads.items():
        x = position + (peers.index(peer) - (len(peers) - 1) / 2) * width
        whisker = [[height - least], [greatest - height]] if greatest > least else None
        axes.bar(x, height, width * 0.94, color=COLORS[peer], yerr=whisker, error_kw={"elinewidth": 1, "capsize": 2})
        axes.annotate(
            f"{height:.3g}", (x, greatest), (0, 3), textcoords="offset points", ha="center", fontsize=7, rotation=90
        )
        if mark is not None:
            level = mark(streams[position]["peers"][peer])
            axes.plot([x - width * 0.45, x + width * 0.45], [level, level], color="black", linewidth=2)
    _log_scale(axes)
    heights = [height for height, _, _ in spreads.values()]
    # Bars on a logarithmic scale begin somewhere: at half of the least, and the labels need room above.
    axes.set_ylim(min(heights) / 2, max(heights) * 3)
    axes.set_xticks(range(len(streams)), [stream["name"] for stream in streams], rotation=20, ha="right", fontsize=9)
    axes.tick_params(axis="x", length=0)


def _log_scale(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axes.yaxis.set_minor_locator(NullLocator())


def _legend(figure: Figure, shown: Sequence[str], streams: Sequence[dict[str, Any]]) -> None:
    peers = [peer for peer in shown if any(peer in stream["peers"] for stream in streams)]
    figure.legend([Patch(color=COLORS[peer]) for peer in peers], [*peers], loc="outside lower center", ncols=len(peers))
