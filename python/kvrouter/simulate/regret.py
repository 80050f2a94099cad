"""The regret table: every policy on every workload and fleet size, relative to the best of each cell.

``python -m kvrouter.simulate.regret`` (``make policies``) runs the simulations and writes ``policies.md``, its plot and
the figures themselves (``policies.jsonl``).  A cell is the geometric mean over seeds.  ``adaptive`` was tuned on
some seeds; the others, and workers with half of the cache, are reported apart.
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

from kvrouter.simulate.regret_report import BATCHED, Results, write_report

TUNED_SEEDS, HELD_OUT_SEEDS = (0, 1), (10, 11)
#: Fleet sizes, and of each kind of seeds how many: the larger a fleet, the less a figure varies with the seed.
SIZES = {2: 2, 8: 2, 32: 2, 128: 2, 512: 1}
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

#: Other settings than the main table's, for fleets of 8 and 32 and held-out seeds: profile, options, number of seeds.
OTHER_SETTINGS: dict[str, tuple[str, dict[str, Any], int]] = {
    "a100": ("a100-8b", {}, 2),
    "half caches": ("h100-8b", {"cache_share": 0.5}, 1),
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


def _run_all(jobs: list[tuple[str, Job]], rows: dict[str, list[dict[str, Any]]], partial: Path, processes: int) -> None:
    """Runs the jobs that ``rows`` has no figures of, and adds them; ``partial`` holds them meanwhile."""
    done = {(kind, row["workload"], row["workers"], row["seed"], row["policy"]) for kind in rows for row in rows[kind]}
    left = [(kind, job) for kind, job in jobs if (kind, *job[:4]) not in done]
    began = time.monotonic()
    with ProcessPoolExecutor(processes) as executor, partial.open("a", encoding="utf-8") as log:
        figures = executor.map(_run, (job for _, job in left))
        for count, ((kind, _), row) in enumerate(zip(left, figures, strict=True), 1):
            rows.setdefault(kind, []).append(row)
            log.write(json.dumps({"kind": kind} | row) + "\n")
            log.flush()
            if count % 100 == 0:
                print(f"{count} of {len(left)} runs, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    partial.unlink()


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in row.items()}


def _finished(path: Path, without: str | None) -> dict[str, list[dict[str, Any]]]:
    """The figures in a file of an earlier run, by kind; ``without`` a policy that is to be run again."""
    rows: dict[str, list[dict[str, Any]]] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row["policy"] != without:
                rows.setdefault(row.pop("kind"), []).append(row)
    return rows


def _jobs(
    sizes: dict[int, int], tuned: Sequence[int], held_out: Sequence[int], scale: float, disturbed_size: int
) -> list[tuple[str, Job]]:
    """All that is to be run, with its kind: "main", one of OTHER_SETTINGS or one of DISTURBANCES."""
    from kvrouter import policy_names
    from kvrouter.simulate import WORKLOADS

    policies = [*policy_names(), BATCHED]
    jobs: list[tuple[str, Job]] = []
    for workers in sorted(sizes, reverse=True):  # the long ones first
        for workload in WORKLOADS:
            for policy in policies:
                for seed in (*tuned[: sizes[workers]], *held_out[: sizes[workers]]):
                    jobs.append(("main", (workload, workers, seed, policy, {}, scale, "h100-8b")))
                for kind, (profile, settings, count) in OTHER_SETTINGS.items():
                    for seed in held_out[:count] if workers in (8, 32) else ():
                        jobs.append((kind, (workload, workers, seed, policy, settings, scale, profile)))
    for name, settings in DISTURBANCES.items():
        for workload in WORKLOADS:
            for seed in held_out[: sizes[disturbed_size]]:
                jobs.append((name, (workload, disturbed_size, seed, "adaptive", settings, scale, "h100-8b")))
    return jobs


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the simulations and writes the report; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m kvrouter.simulate.regret", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small fleets, a seed each, a part of the requests")
    parser.add_argument("--output", type=Path, default=Path("docs/performance"), help="folder to write to")
    parser.add_argument(
        "--redo", metavar="POLICY", help="run this policy alone, the others' figures being there already"
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep what the folder's files have: go on after an interruption"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(argv)

    tuned, held_out = (TUNED_SEEDS[:1], HELD_OUT_SEEDS[:1]) if options.quick else (TUNED_SEEDS, HELD_OUT_SEEDS)
    sizes, scale = ({2: 1, 8: 1}, 0.25) if options.quick else (SIZES, 1.0)
    disturbed_size = 8 if options.quick else 32
    jobs = _jobs(sizes, tuned, held_out, scale, disturbed_size)
    began = time.monotonic()
    options.output.mkdir(parents=True, exist_ok=True)
    figures, partial = options.output / "policies.jsonl", options.output / "policies.partial.jsonl"
    rows: dict[str, list[dict[str, Any]]] = {}
    if options.resume or options.redo:
        rows = _finished(figures, options.redo)
    if options.resume:
        for kind, part in _finished(partial, None).items():
            rows.setdefault(kind, []).extend(part)
    else:
        partial.unlink(missing_ok=True)
    _run_all(jobs, rows, partial, options.processes)
    lines = [json.dumps({"kind": kind} | _rounded(row)) for kind, part in rows.items() for row in part]
    figures.write_text("\n".join(lines) + "\n", encoding="utf-8")
    page = write_report(
        Results(rows["main"]),
        {name: Results(rows[name]) for name in DISTURBANCES},
        {
            "A100 (`a100-8b`; adaptive was tuned on it with other seeds)": Results(rows["a100"]),
            "Half of the cache (`h100-8b`; adaptive was not tuned on it)": Results(rows["half caches"]),
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
