"""``kvrouter simulate``: a policy, or all of them, on a workload in the fleet simulator."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

EXIT_USAGE = 2


def simulate(
    workload: Annotated[str, typer.Option(help="One of the built-in workloads, see docs/policies.md.")] = "grpo",
    trace: Annotated[
        Path | None,
        typer.Option(help="Instead: JSON lines with timestamp (ms), input_length, output_length and hash_ids."),
    ] = None,
    speed: Annotated[float, typer.Option(help="With --trace: how much faster than it was recorded.", min=1e-9)] = 1.0,
    workers: Annotated[int, typer.Option(help="Workers in the fleet.", min=1)] = 32,
    policy: Annotated[str, typer.Option(help="A policy by name, or 'all'.")] = "all",
    seed: Annotated[int, typer.Option(help="Of the workload and of the router's ties.", min=0)] = 0,
    scale: Annotated[float, typer.Option(help="Multiplies the number of requests.", min=0.001)] = 1.0,
    profile: Annotated[str, typer.Option(help="What a worker is: h100-8b, a100-8b or cpu-tiny.")] = "h100-8b",
    num_blocks: Annotated[int | None, typer.Option(help="KV blocks of each worker. Default: the profile's.")] = None,
    event_delay_ms: Annotated[float, typer.Option(help="Until KV events reach the router.", min=0)] = 5.0,
    load_delay_ms: Annotated[float, typer.Option(help="Until load messages reach the router.", min=0)] = 5.0,
    load_interval_ms: Annotated[
        float, typer.Option(help="Between two load messages of a worker; 0: one after each step.", min=0)
    ] = 0.0,
    load_loss: Annotated[float, typer.Option(help="Share of the load messages that are lost.", min=0, max=1)] = 0.0,
    feedback: Annotated[bool, typer.Option(help="Tell the router of first tokens and completions (tickets).")] = True,
    batches: Annotated[
        bool | None,
        typer.Option(help="Decide requests that arrive together in one call. Default: for adaptive alone."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON line a policy instead of a table.")] = False,
) -> None:
    """Serve a workload with a simulated fleet, in virtual time.

    The workers are vLLM's scheduler, block manager and prefix cache with a step-time model; the router is the product's
    own. Exit status: 0, or 2 for settings that do not fit.
    """
    from kvrouter import policy_names
    from kvrouter.simulate import PROFILES, workloads
    from kvrouter.simulate.fleet import simulate as run

    try:
        if profile not in PROFILES:
            raise ValueError(f"profile '{profile}' is unknown; there are: {', '.join(PROFILES)}")
        policies = policy_names() if policy == "all" else [policy]
        if trace is not None:
            requests = workloads.trace_requests(trace.stem, workloads.read_trace(trace), speed)
        else:
            requests = workloads.make(workload, workers, seed, scale)
        if num_blocks is not None:
            requests.num_blocks = num_blocks
        rows = []
        for name in policies:
            result = run(
                requests,
                workers,
                name,
                seed=seed,
                profile=PROFILES[profile],
                event_delay_s=event_delay_ms / 1e3,
                load_delay_s=load_delay_ms / 1e3,
                load_interval_s=load_interval_ms / 1e3,
                load_loss=load_loss,
                feedback=feedback,
                batches=batches,
            )
            row = {
                "workload": requests.name,
                "workers": workers,
                "policy": name,
                "seed": seed,
                "step_s": result.seconds,
                **{key: value for key, value in asdict(result).items() if key != "seconds"},
            }
            if as_json:
                typer.echo(json.dumps(row))
            rows.append(row)
    except (ValueError, OSError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(EXIT_USAGE) from None
    if not as_json:
        _print_table(rows)


def _print_table(rows: list[dict[str, object]]) -> None:
    from rich.table import Table

    first = rows[0]
    table = Table(
        title=f"{first['workload']}, {first['workers']} workers, seed {first['seed']}, {first['requests']} requests",
        title_justify="left",
    )
    table.add_column("policy")
    columns = {
        "step_s": ("step\n[s]", "{:.2f}"),
        "tokens_per_s": ("tokens/s", "{:,.0f}"),
        "ttft_p99_s": ("TTFT p99\n[s]", "{:.3f}"),
        "hit_rate": ("hit\nrate", "{:.3f}"),
        "imbalance": ("imbal-\nance", "{:.2f}"),
    }
    for heading, _ in columns.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(str(row["policy"]), *(form.format(row[key]) for key, (_, form) in columns.items()))
    Console().print(table)
