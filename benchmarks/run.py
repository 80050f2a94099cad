#!/usr/bin/env python3
"""Measures everything and writes the report: ``make bench`` calls this.

Builds the programs, makes the op streams, runs the index beside Dynamo's by turns, then decoding and decisions, checks
every answer against the naive model, and writes results.json, results.md and plots.  Exits with status 1 when a program
fails or kvrouter answers otherwise than the naive model.  A peer's wrong answers and targets that are missed are
reported, not failed on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import plots, programs, tables
from harness.programs import BenchError, say
from harness.streams import QUICK_STREAMS, STREAMS, MadeStream, Stream, make_stream
from harness.summary import summarise
from harness.targets import CONCURRENT, OURS, RADIX, targets

DOCS = programs.ROOT / "docs" / "performance"
QUICK_OUTPUT = programs.ROOT / "out" / "bench"


@dataclass(frozen=True)
class Settings:
    """How much is measured.  seconds: of each kind of phase of readers and writer."""

    quick: bool
    repeats: int
    seconds: float
    churn: tuple[int, int]
    decode_blocks: int
    decision_calls: int

    @property
    def streams(self) -> Sequence[Stream]:
        """The op streams."""
        return QUICK_STREAMS if self.quick else STREAMS


def index_commands(settings: Settings, path: Path, *, with_dynamo: bool) -> dict[str, tuple[list[Any], list[int]]]:
    """The program of each index, and the cores it may use: one for what runs in one thread."""
    cores = programs.usable_cores()
    beside = ["--threads", 2, "--seconds", settings.seconds] if len(cores) > 1 else []
    commands: dict[str, tuple[list[Any], list[int]]] = {OURS: ([programs.BENCH_INDEX, path, *beside], cores)}
    if with_dynamo:
        commands[RADIX] = ([programs.DYNAMO_PEER, "radix", path], cores[-1:])
        commands[CONCURRENT] = ([programs.DYNAMO_PEER, "concurrent", path, *beside], cores)
    return commands


def wrong_answers(figures: dict[str, Any], made: MadeStream) -> list[str]:
    """The checksums that are not the naive model's.  Raises BenchError if there is one, and it is kvrouter's."""
    wrong = [name for name, right in made.checksums.items() if figures[name] != right]
    for name in wrong:
        text = (
            f"{figures['peer']} answers {made.stream.name} wrongly: {name} {figures[name]}, not {made.checksums[name]}"
        )
        if figures["peer"] == OURS:
            raise BenchError(text)
        say(text)
    return wrong


def measure_stream(stream: Stream, settings: Settings, *, with_dynamo: bool) -> dict[str, Any]:
    """All indexes on one stream, by turns; who begins changes from turn to turn."""
    say(f"{stream.name}: making the op stream and its checksums (kept for the next time)")
    made = make_stream(stream, programs.BUILD / "ops")
    commands = index_commands(settings, made.path, with_dynamo=with_dynamo)
    order = list(commands)
    runs: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    wrong: defaultdict[str, set[str]] = defaultdict(set)
    for repeat in range(settings.repeats):
        say(f"{stream.name}: run {repeat + 1} of {settings.repeats}")
        for peer in order[repeat % len(order) :] + order[: repeat % len(order)]:
            command, cores = commands[peer]
            figures = programs.run_json(command, cores)
            wrong[peer].update(wrong_answers(figures, made))
            runs[peer].append(figures)
    return {
        "name": stream.name,
        "title": stream.title,
        "block_size": stream.options.block_size,
        "workers": stream.options.workers,
        "ops": made.ops,
        "live_pairs": made.live_pairs,
        **made.checksums,
        "peers": {peer: {**_figures_only(summarise(runs[peer])), "wrong": sorted(wrong[peer])} for peer in order},
    }


def _figures_only(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if isinstance(value, dict)}


def repeated(settings: Settings, what: str, command: Sequence[str | Path]) -> list[dict[str, Any]]:
    """The records of as many runs as are wanted, on one core."""
    say(what)
    core = programs.usable_cores()[-1:]
    return [programs.run_json(command, core) for _ in range(settings.repeats)]


def measure_rest(settings: Settings) -> dict[str, Any]:
    """Everything but the op streams."""
    pairs, rounds = settings.churn
    index, decoder = programs.BENCH_INDEX, programs.BENCH_DECODE
    churn = repeated(settings, "inserting and removing", [index, "--churn", str(pairs), str(rounds)])
    decode = repeated(settings, "decoding", [decoder, "--blocks", str(settings.decode_blocks)])
    command: list[str | Path] = [sys.executable, programs.DECISION, "--calls", str(settings.decision_calls)]
    decision = repeated(settings, "deciding", command)
    return {
        "churn": _figures_only(summarise(churn)),
        "decode": [summarise(cases) for cases in zip(*(run["cases"] for run in decode), strict=True)],
        "decision": [
            {**summarise(rows), "workers": rows[0]["workers"], "tokens": rows[0]["tokens"]}
            for rows in zip(*(run["decisions"] for run in decision), strict=True)
        ],
    }


def measure(settings: Settings) -> dict[str, Any]:
    """All results."""
    programs.build()
    missing = programs.build_dynamo()
    if missing:
        say(f"{missing}: Dynamo's indexes are left out")
    streams = [measure_stream(stream, settings, with_dynamo=not missing) for stream in settings.streams]
    results: dict[str, Any] = {
        "machine": programs.machine(),
        "settings": {"repeats": settings.repeats, "seconds": settings.seconds, "quick": settings.quick},
        "peer_missing": missing,
        "streams": streams,
        **measure_rest(settings),
    }
    results["targets"] = [target.as_json() for target in targets(results)]
    return results


def write_report(results: dict[str, Any], folder: Path) -> None:
    """Writes results.json, results.md and the plots."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    names = plots.write_plots(results, folder)
    (folder / "results.md").write_text(tables.markdown(results, names))


def parse() -> tuple[Settings, Path, Path | None]:
    """Settings, where the report goes, and the results to report again, if any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small streams, one run: shows that all works")
    parser.add_argument("--repeats", type=int, help="runs of each program (default 3; quick: 1)")
    parser.add_argument("--output", type=Path, help="folder of the report (default docs/performance; quick: out/bench)")
    parser.add_argument("--report-only", type=Path, metavar="RESULTS.json", help="write the report of an earlier run")
    options = parser.parse_args()
    repeats = options.repeats if options.repeats is not None else 1 if options.quick else 3
    if repeats < 1:
        parser.error("--repeats must be at least 1")
    output = options.output or (QUICK_OUTPUT if options.quick else DOCS)
    if options.quick:
        settings = Settings(True, repeats, 0.4, (20_000, 9), 5_000, 300)
    else:
        settings = Settings(False, repeats, 2.0, (1_000_000, 100), 100_000, 3_000)
    return settings, output, options.report_only


def main() -> int:
    """The command line; returns the exit status."""
    settings, output, report_only = parse()
    try:
        results = json.loads(report_only.read_text()) if report_only else measure(settings)
        write_report(results, output)
    except BenchError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 1
    for target in results["targets"]:
        say(f"{'met   ' if target['met'] else 'MISSED'}  {target['what']}: {target['measured']} ({target['needed']})")
    say(f"report: {output / 'results.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
