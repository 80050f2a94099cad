"""``python -m chaos``: a run on simulated workers or real vLLM.  Exit status 1: something was lost, or is wrong."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
from pathlib import Path

from chaos.report import Report, together
from chaos.run import Options, run_sim, run_vllm


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="python -m chaos", description=__doc__)
    add = parser.add_argument
    add("--engine", choices=("sim", "vllm", "both"), default="sim", help="both: one after the other")
    add("--workers", type=int, help="32 simulated ones, 2 of vLLM, if not given")
    add("--faults", type=int, help="1000 and 20, if not given")
    add("--at-once", type=int, help="most faults at a time: 16 and 2, if not given")
    add("--kinds", default="", help="comma-separated names of faults; none: all")
    add("--users", type=int, help="clients, each with one request at a time: 24 and 4, if not given")
    add("--think-s", type=float, default=0.2, help="mean seconds between an answer and the client's next request")
    add("--seed", type=int, help="of faults and requests; printed, to repeat a run")
    add("--logs", type=Path, help="folder for the processes' logs; none: a temporary one")
    return parser.parse_args(argv)


def run(engine: str, given: argparse.Namespace, seed: int, folder: Path) -> Report:
    """One run on one kind of worker."""
    real = engine == "vllm"
    folder.mkdir(parents=True, exist_ok=True)
    options = Options(
        workers=given.workers or (2 if real else 32),
        faults=given.faults or (20 if real else 1000),
        at_once=given.at_once or (2 if real else 16),
        kinds=frozenset(filter(None, given.kinds.split(","))),
        users=given.users or (4 if real else 24),
        think_s=given.think_s,
        seed=seed,
        folder=folder,
    )
    return asyncio.run(run_vllm(options) if real else run_sim(options))


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    given = parse(argv)
    seed = random.SystemRandom().randrange(2**31) if given.seed is None else given.seed
    engines = ("sim", "vllm") if given.engine == "both" else (given.engine,)
    reports = []
    with tempfile.TemporaryDirectory() as temporary:
        for engine in engines:
            print(f"{engine} workers, seed {seed} (--seed repeats it)", file=sys.stderr, flush=True)
            reports.append(run(engine, given, seed, (given.logs or Path(temporary)) / engine))
            reports[-1].explain()
            if len(engines) > 1:
                print(f"{engine}: {json.dumps(reports[-1].summary())}", file=sys.stderr, flush=True)
    print(json.dumps(together(reports)), flush=True)
    return 0 if all(report.passed for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
