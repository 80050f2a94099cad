"""The page of the regret table: every policy's figures relative to the best of its cell, with a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvrouter.bench.plot_style import PLOT_STYLE

BATCHED = "linear (batch)"  # the guide's score with this project's batch call
#: Workloads that are a batch to be done: the time of the last request counts.  Of the others it is TTFT p99.
CLOSED = ("grpo", "grpo_long_tail", "grpo_agent", "few_shot", "thrash")


class Results:
    """Figures by (workload, workers, policy, seed)."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows = {(r["workload"], r["workers"], r["policy"], r["seed"]): r for r in rows}
        self.policies = sorted({r["policy"] for r in rows}, key=lambda policy: (policy == BATCHED, policy))
        self.workloads = list(dict.fromkeys(r["workload"] for r in rows))
        self.sizes = sorted({r["workers"] for r in rows})

    def mean(self, workload: str, workers: int, policy: str, seeds: Sequence[int], metric: str) -> float:
        """Geometric mean over those of the seeds that were run."""
        keys = [(workload, workers, policy, seed) for seed in seeds]
        values = [max(self._rows[key][metric], 1e-9) for key in keys if key in self._rows]
        return float(np.exp(np.mean(np.log(values))))

    def regrets(self, workload: str, workers: int, seeds: Sequence[int], metric: str) -> dict[str, float]:
        """Each policy's figure relative to the best of the cell; the lower the better."""
        means = {policy: self.mean(workload, workers, policy, seeds, metric) for policy in self.policies}
        best = min(means.values())
        return {policy: value / best for policy, value in means.items()}


def main_metric(workload: str) -> str:
    """What counts most in a workload."""
    return "seconds" if workload in CLOSED else "ttft_p99_s"


def _table(results: Results, seeds: Sequence[int], metrics: dict[str, str]) -> list[str]:
    lines = [
        "| workload | workers | " + " | ".join(results.policies) + " |",
        "|---|---:|" + "---:|" * len(results.policies),
    ]
    for workload in results.workloads:
        for workers in results.sizes:
            regrets = results.regrets(workload, workers, seeds, metrics[workload])
            cells = [f"**{r:.2f}**" if r <= 1.03 else f"{r:.2f}" for r in regrets.values()]
            lines.append(f"| {workload} | {workers} | " + " | ".join(cells) + " |")
    return lines


def _summary(results: Results, seeds: Sequence[int], metrics: dict[str, str]) -> list[str]:
    cells = [
        results.regrets(workload, workers, seeds, metrics[workload])
        for workload in results.workloads
        for workers in results.sizes
    ]
    lines = [
        "| policy | mean | worst | best of cell | within 3% | worse than round robin |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for policy in results.policies:
        values = np.array([cell[policy] for cell in cells])
        robin = np.array([cell["round_robin"] for cell in cells])
        lines.append(
            f"| {policy} | {np.exp(np.log(values).mean()):.3f} | {values.max():.2f} | {(values <= 1 + 1e-9).sum()} | "
            f"{(values <= 1.03).sum()} of {len(values)} | {(values > robin * 1.005).sum()} |"
        )
    return lines


def _lost(results: Results, seeds: Sequence[int], metrics: dict[str, str]) -> list[str]:
    lines = []
    for workload in results.workloads:
        for workers in results.sizes:
            regrets = results.regrets(workload, workers, seeds, metrics[workload])
            if regrets["adaptive"] > 1.03:
                best = min(regrets, key=lambda policy: regrets[policy])
                lines.append(f"- {workload}, {workers} workers: {regrets['adaptive']:.2f} (best: {best})")
    return lines or ["- none"]


def _ahead(results: Results, seeds: Sequence[int], workers: int) -> list[str]:
    lines = []
    for workload in [w for w in results.workloads if w.startswith("grpo")]:
        ours = results.mean(workload, workers, "adaptive", seeds, "seconds")
        rest = ", ".join(
            f"{policy} {results.mean(workload, workers, policy, seeds, 'seconds') / ours - 1:+.1%}"
            for policy in ("linear", BATCHED, "prefill_decode", "round_robin")
        )
        lines.append(f"- {workload}: adaptive {ours:.2f} s; steps of the others take longer by: {rest}")
    return lines


def _plot(results: Results, seeds: Sequence[int], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    count = len(results.workloads)
    with plt.rc_context(PLOT_STYLE):
        figure, axes = plt.subplots(2, (count + 1) // 2, figsize=(4 * ((count + 1) // 2), 7.5), squeeze=False)
        for axis, workload in zip(axes.flat, results.workloads, strict=False):
            for policy in results.policies:
                values = [results.regrets(workload, w, seeds, main_metric(workload))[policy] for w in results.sizes]
                ours = policy == "adaptive"
                axis.plot(
                    range(len(results.sizes)), values, marker="o", markersize=4, label=policy,
                    linewidth=3 if ours else 1.2, zorder=3 if ours else 2, color="black" if ours else None,
                )  # fmt: skip
            axis.set_xticks(range(len(results.sizes)), [str(w) for w in results.sizes])
            axis.set_title(f"{workload} ({'step time' if workload in CLOSED else 'TTFT p99'})", fontsize=10)
            axis.set_ylim(0.95, 2.6)
            axis.set_xlabel("workers")
        for axis in axes.flat[count:]:
            axis.axis("off")
        for row in axes:
            row[0].set_ylabel("relative to the best")
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=6, fontsize=9)
        figure.tight_layout(rect=(0, 0.07, 1, 1))
        figure.savefig(path, dpi=100)
        plt.close(figure)


def _disturbance_table(base: Results, rows: dict[str, Results], seeds: Sequence[int], workers: int) -> list[str]:
    lines = ["| adaptive with | " + " | ".join(base.workloads) + " |", "|---|" + "---:|" * len(base.workloads)]
    for name, results in rows.items():
        cells = []
        for workload in base.workloads:
            metric = main_metric(workload)
            change = results.mean(workload, workers, "adaptive", seeds, metric) / base.mean(
                workload, workers, "adaptive", seeds, metric
            )
            cells.append(f"{change - 1:+.1%}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def write_report(
    results: Results, disturbed: dict[str, Results], others: dict[str, Results], seeds: dict[str, Sequence[int]],
    command: str, output: Path, disturbed_size: int,
) -> Path:  # fmt: skip
    """Writes ``policies.md`` and its plot into the folder ``output``; returns the page's path."""
    main = {workload: main_metric(workload) for workload in results.workloads}
    ttft = dict.fromkeys(results.workloads, "ttft_p99_s")
    parts = [
        "# Policies, compared in the fleet simulator",
        "",
        f"`{command}` wrote this page. Workers are one H100 with an 8B model each (`h100-8b`), but where the page says "
        "otherwise; workloads, policies and the simulator are described in [policies.md](../policies.md). A figure is "
        "the geometric mean over seeds, relative to the best policy of its row: 1.00 is the best, 1.10 takes 10% "
        "longer. What is compared is the time of the last request for batches "
        f"({', '.join(w for w in results.workloads if w in CLOSED)}), and the 99th percentile of the time to first "
        "token for open loops. Bold: within 3% of the best.",
        "",
        "Policies decide request by request, as they are used in the field; `adaptive` decides a batch in one call, "
        f"and `{BATCHED}` is the guide's score with this project's batch call.",
        "",
    ]
    for title, key in (
        ("Held-out seeds (adaptive was not tuned on them)", "held_out"),
        ("Seeds that adaptive was tuned on", "tuned"),
    ):
        chosen = seeds[key]
        if not chosen:
            continue
        parts += [f"## {title}: {', '.join(map(str, chosen))}", "", *_summary(results, chosen, main), ""]
        parts += ["Cells where adaptive is more than 3% behind:", "", *_lost(results, chosen, main), ""]
        size = 32 if 32 in results.sizes else results.sizes[-1]
        parts += [f"GRPO step time at {size} workers:", "", *_ahead(results, chosen, size), ""]
    chosen = seeds["held_out"] or seeds["tuned"]
    parts += ["![regret by fleet size](policies.png)", "", "## By cell (held-out seeds)", ""]
    parts += [*_table(results, chosen, main), ""]
    parts += ["### TTFT p99, all workloads", "", *_table(results, chosen, ttft), ""]
    parts += ["### Time until the last request is done (throughput), all workloads", ""]
    parts += ["In an open loop that is the time of one request: the one that ends last.", ""]
    parts += [*_table(results, chosen, dict.fromkeys(results.workloads, "seconds")), ""]
    for title, other in others.items():
        sizes_of = " and ".join(map(str, other.sizes))
        parts += [f"## {title}, {sizes_of} workers, held-out seeds", "", *_summary(other, chosen, main), ""]
        parts += ["Cells where adaptive is more than 3% behind:", "", *_lost(other, chosen, main), ""]
    parts += [f"## Disturbances ({disturbed_size} workers)", ""]
    parts += ["Change of the figure that counts, against 5 ms delays, all messages, feedback:", ""]
    parts += _disturbance_table(results, disturbed, chosen, disturbed_size)
    _plot(results, chosen, output / "policies.png")
    page = output / "policies.md"
    page.write_text("\n".join(parts) + "\n", encoding="utf-8")
    return page
