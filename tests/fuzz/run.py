"""Runs the fuzz targets, each for so many seconds: ``python tests/fuzz/run.py --seconds 600`` (``make fuzz``).

What a target found new is kept under out/fuzz/NAME/corpus and goes on from there in the next run; an input that broke
something lies in out/fuzz/NAME.  The last line is JSON; the exit status is 1 where anything was found.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib.util
import json
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OUT = ROOT / "out" / "fuzz"
CPP = ("kv_events", "load_message", "worker_pages", "worker_url", "http_connection", "service_api", "gateway_request",
       "peer_message", "snapshot")  # fmt: skip
PYTHON = ("workers_file", "trace_file", "grpo_config", "router_config")


@dataclass
class Result:
    """What came of one target."""

    target: str
    seconds: float
    executed: int = 0
    coverage: int = 0
    """Edges of the control-flow graph that were reached."""
    corpus: int = 0
    findings: list[str] = field(default_factory=list)
    exit_status: int = 0


def command(target: str, build: Path) -> list[str]:
    """The program of a target."""
    if target in CPP:
        return [str(build / "tests" / "fuzz" / f"fuzz_{target}")]
    return [sys.executable, str(HERE / "python_targets.py"), target]


def run(target: str, build: Path, seconds: int) -> Result:
    """Fuzzes one target."""
    folder = OUT / target
    grown = folder / "corpus"
    grown.mkdir(parents=True, exist_ok=True)
    before = {path.name for path in folder.iterdir() if path.is_file()}
    started = time.monotonic()
    with open(folder / "log", "wb") as log:
        status = subprocess.run(
            [
                *command(target, build),
                f"-max_total_time={seconds}",
                "-max_len=16384",
                "-timeout=20",  # seconds an input may take
                "-rss_limit_mb=2048",
                "-print_final_stats=1",
                f"-artifact_prefix={folder}/",
                str(grown),
                str(HERE / "corpus" / target),
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            check=False,
        ).returncode
    result = Result(target, round(time.monotonic() - started, 1), exit_status=status)
    text = (folder / "log").read_text(encoding="utf-8", errors="replace")
    if executed := re.findall(r"stat::number_of_executed_units:\s+(\d+)", text):
        result.executed = int(executed[-1])
    if reached := re.findall(r"cov: (\d+) .*?corp: (\d+)/", text):
        result.coverage, result.corpus = map(int, reached[-1])
    now = {path.name for path in folder.iterdir() if path.is_file()} - before - {"log"}
    result.findings = sorted(str((folder / name).relative_to(ROOT)) for name in now)
    return result


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "fuzz", help="where the programs were built")
    parser.add_argument("--seconds", type=int, default=600, help="for each target")
    parser.add_argument("--jobs", type=int, default=2, help="targets at a time")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join((*CPP, *PYTHON))}; default all")
    args = parser.parse_args()
    if unknown := set(args.targets) - {*CPP, *PYTHON}:
        parser.error(f"there is no target {', '.join(sorted(unknown))}")
    targets = args.targets or [*CPP, *PYTHON]
    if importlib.util.find_spec("atheris") is None:
        left_out = [target for target in targets if target in PYTHON]
        print(f"left out, as there is no Atheris for this Python: {', '.join(left_out)}", flush=True)
        targets = [target for target in targets if target not in PYTHON]

    print(f"{'target':16} {'seconds':>8} {'executed':>10} {'coverage':>9} {'corpus':>7}  findings", flush=True)
    results = []
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        for result in pool.map(lambda target: run(target, args.build, args.seconds), targets):
            results.append(result)
            found = ", ".join(result.findings) or ("none" if result.exit_status == 0 else "see its log")
            figures = f"{result.seconds:8.1f} {result.executed:10} {result.coverage:9} {result.corpus:7}"
            print(f"{result.target:16} {figures}  {found}", flush=True)
    failed = [result.target for result in results if result.exit_status != 0 or result.findings]
    for name in failed:
        print(f"\n{name}: the end of out/fuzz/{name}/log")
        print("\n".join((OUT / name / "log").read_text(encoding="utf-8", errors="replace").splitlines()[-60:]))
    if failed:
        print("\nCopy the input into tests/fuzz/corpus/TARGET under a name that says what it is: the tests replay it.")
    print(json.dumps({"targets": len(results), "failed": failed, "results": [asdict(result) for result in results]}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
