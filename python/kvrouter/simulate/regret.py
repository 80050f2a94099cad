"""The regret table: every policy on every workload and fleet size, relative to the best of each cell.

``python -m kvrouter.simulate.regret`` (``make policies``) runs the simulations and writes ``policies.md``, its plot and
the figures themselves (``policies.jsonl``).  A cell is the geometric mean over seeds.  Some seeds were looked at while
``adaptive`` was made; the others, and workers with half of the cache, were not, and are reported apart.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

TUNED_SEEDS, HELD_OUT_SEEDS = (20, 21, 22, 23), (40, 41, 42, 43)
#: Fleet sizes, and of each kind of seeds how many: the larger a fleet, the less a figure varies with the seed.
SIZES = {2: 4, 8: 4, 32: 2, 128: 2, 512: 1}
BATCHED = "linear (batch)"  # the guide's score with this project's batch call
#: Workloads that are a batch to be done: the time of the last request counts.  Of the others it is TTFT p99.
CLOSED = ("grpo", "grpo_long_tail", "grpo_agent", "few_shot", "thrash")
#: What goes wrong on the way, and without feedback: settings of adaptive on a fleet of 32.
DISTURBANCES: dict[str, dict[str, Any]] = {
    "events 0 s late": {"event_delay_s": 0.0, "load_delay_s": 0.0},
    "events 0.5 s late": {"event_delay_s": 0.5, "load_delay_s": 0.5},
    "events 2 s late": {"event_delay_s": 2.0, "load_delay_s": 2.0},
    "half of the load messages lost": {"load_loss": 0.5},
    "no load messages": {"load_loss": 1.0},
    "no feedback": {"feedback": False},
    "no feedback, no load messages": {"feedback": False, "load_loss": 1.0},
}

#: Settings other than those of the main table, on fleets of 8 and 32 and held-out seeds: profile, options.
OTHER_SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "a100": ("a100-8b", {}),
    "half caches": ("h100-8b", {"cache_share": 0.5}),
}

Job = tuple[str, int, int, str, dict[str, Any], float, str]


def _run(job: Job) -> dict[str, Any]:
    workload, workers, seed, policy, settings, scale, profile = job
    from kvrouter.simulate import PROFILES, simulate, workloads

    requests = workloads.make(workload, workers, seed, scale)
    options = dict(settings)
    share = options.pop("cache_share", None)
    if share is not None:
        requests.num_blocks = int(share * (requests.num_blocks or PROFILES[profile].num_blocks))
    name = policy
    if policy == BATCHED:
        name, options["batches"] = "linear", True
    result = asdict(simulate(requests, workers, name, seed=seed, profile=PROFILES[profile], **options))
    del result["decision_p50_us"]  # real time: says nothing where two processes share the machine
    return {"workload": workload, "workers": workers, "seed": seed, "policy": policy, "profile": profile} | result


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
    figure, axes = plt.subplots(2, (count + 1) // 2, figsize=(4 * ((count + 1) // 2), 7), squeeze=False)
    for axis, workload in zip(axes.flat, results.workloads, strict=False):
        for policy in results.policies:
            values = [results.regrets(workload, w, seeds, main_metric(workload))[policy] for w in results.sizes]
            ours = policy == "adaptive"
            axis.plot(
                range(len(results.sizes)), values, marker="o", label=policy, linewidth=3 if ours else 1,
                zorder=3 if ours else 2, color="black" if ours else None,
            )  # fmt: skip
        axis.set_xticks(range(len(results.sizes)), [str(w) for w in results.sizes])
        axis.set_title(f"{workload} ({'step time' if workload in CLOSED else 'TTFT p99'})", fontsize=10)
        axis.set_ylim(0.95, 2.6)
        axis.set_xlabel("workers")
        axis.grid(alpha=0.3)
    for axis in axes.flat[count:]:
        axis.axis("off")
    axes[0][0].set_ylabel("relative to the best")
    axes[1][0].set_ylabel("relative to the best")
    axes[0][0].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
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
        ("Held-out seeds (not looked at while adaptive was made)", "held_out"),
        ("Seeds that adaptive was made on", "tuned"),
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


def _run_all(
    jobs: list[tuple[str, Job]], rows: dict[str, list[dict[str, Any]]], partial: Path, resume: bool, processes: int
) -> None:
    """Runs the jobs and adds their figures to ``rows``; ``partial`` holds them meanwhile."""
    done: set[tuple[Any, ...]] = set()
    if resume and partial.exists():
        for line in partial.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            kind = row.pop("kind")
            rows.setdefault(kind, []).append(row)
            done.add((kind, row["workload"], row["workers"], row["seed"], row["policy"]))
    left = [(kind, job) for kind, job in jobs if (kind, *job[:4]) not in done]
    began = time.monotonic()
    with ProcessPoolExecutor(processes) as executor, partial.open("a" if resume else "w", encoding="utf-8") as log:
        figures = executor.map(_run, (job for _, job in left))
        for count, ((kind, _), row) in enumerate(zip(left, figures, strict=True), 1):
            rows.setdefault(kind, []).append(row)
            log.write(json.dumps({"kind": kind} | row) + "\n")
            log.flush()
            if count % 100 == 0:
                print(f"{count} of {len(left)} runs, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    partial.unlink()


def _read_others(figures: Path, policy: str) -> dict[str, list[dict[str, Any]]]:
    rows: dict[str, list[dict[str, Any]]] = {}
    for line in figures.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        kind = row.pop("kind")
        if row["policy"] != policy:
            rows.setdefault(kind, []).append(row)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the simulations and writes the report; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m kvrouter.simulate.regret", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small fleets, a seed each, a part of the requests")
    parser.add_argument("--output", type=Path, default=Path("docs/performance"), help="folder to write to")
    parser.add_argument(
        "--redo", metavar="POLICY", help="run this policy alone, the others' figures being there already"
    )
    parser.add_argument("--resume", action="store_true", help="go on with a run that was interrupted")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(argv)

    from kvrouter import policy_names
    from kvrouter.simulate import WORKLOADS

    tuned, held_out = (TUNED_SEEDS[:1], HELD_OUT_SEEDS[:1]) if options.quick else (TUNED_SEEDS, HELD_OUT_SEEDS)
    sizes, scale = ({2: 1, 8: 1}, 0.25) if options.quick else (SIZES, 1.0)
    disturbed_size = 8 if options.quick else 32
    policies = [*policy_names(), BATCHED]
    jobs: list[tuple[str, Job]] = []
    for workers in sorted(sizes, reverse=True):  # the long ones first
        for workload in WORKLOADS:
            for policy in policies:
                for seed in (*tuned[: sizes[workers]], *held_out[: sizes[workers]]):
                    jobs.append(("main", (workload, workers, seed, policy, {}, scale, "h100-8b")))
                    if workers in (8, 32) and seed in held_out[:2]:
                        for kind, (profile, settings) in OTHER_SETTINGS.items():
                            jobs.append((kind, (workload, workers, seed, policy, settings, scale, profile)))
    for name, settings in DISTURBANCES.items():
        for workload in WORKLOADS:
            for seed in held_out[: sizes[disturbed_size]]:
                jobs.append((name, (workload, disturbed_size, seed, "adaptive", settings, scale, "h100-8b")))
    began = time.monotonic()
    rows: dict[str, list[dict[str, Any]]] = {}
    figures = options.output / "policies.jsonl"
    if options.redo:
        jobs = [(kind, job) for kind, job in jobs if job[3] == options.redo]
        rows = _read_others(figures, options.redo)
    options.output.mkdir(parents=True, exist_ok=True)
    _run_all(jobs, rows, options.output / "policies.partial.jsonl", options.resume, options.processes)
    lines = [json.dumps({"kind": kind} | row) for kind, part in rows.items() for row in part]
    figures.write_text("\n".join(lines) + "\n", encoding="utf-8")
    page = write_report(
        Results(rows["main"]),
        {name: Results(rows[name]) for name in DISTURBANCES},
        {
            "A100 (`a100-8b`; looked at while adaptive was made)": Results(rows["a100"]),
            "Half of the cache (`h100-8b`; held out)": Results(rows["half caches"]),
        },
        {"tuned": tuned, "held_out": held_out},
        "make policies" + (" POLICIES=--quick" if options.quick else ""),
        options.output,
        disturbed_size,
    )
    print(f"written: {page} ({time.monotonic() - began:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
