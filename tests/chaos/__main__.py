"""``python -m chaos``: a run on simulated workers or real vLLM.  Exit status 1: something was lost, or is wrong."""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
from pathlib import Path

from chaos.run import Options, run_sim, run_vllm


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="python -m chaos", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--engine", choices=("sim", "vllm"), default="sim")
    add("--workers", type=int, default=32)
    add("--faults", type=int, default=1000)
    add("--at-once", type=int, default=12, help="most faults at a time")
    add("--kinds", default="", help="comma-separated names of faults; none: all")
    add("--users", type=int, default=24, help="clients, each with one request at a time")
    add("--think-s", type=float, default=0.2, help="mean seconds between an answer and the client's next request")
    add("--seed", type=int, default=None, help="of faults and requests; printed, to repeat a run")
    add("--logs", type=Path, default=None, help="folder for the processes' logs; none: a temporary one")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    given = parse(argv)
    seed = random.SystemRandom().randrange(2**31) if given.seed is None else given.seed
    print(f"seed {seed} (--seed repeats it)", file=sys.stderr)
    with tempfile.TemporaryDirectory() as temporary:
        folder: Path = given.logs or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        options = Options(
            workers=given.workers,
            faults=given.faults,
            at_once=given.at_once,
            kinds=frozenset(filter(None, given.kinds.split(","))),
            users=given.users,
            think_s=given.think_s,
            seed=seed,
            folder=folder,
        )
        report = asyncio.run(run_vllm(options) if given.engine == "vllm" else run_sim(options))
    report.print()
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
