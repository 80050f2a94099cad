"""NeMo-RL's VllmGeneration with the router on and off, on simulated workers: hit rate and requests/s, as JSON.

``make bench-nemo-rl NEMO_RL_SRC=...``.  GRPO rollouts: ``--prompts`` problems of ``--samples`` samples, all at once;
and conversations, whose prompts grow by each turn.  Both arms take turns; caches are emptied before each.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time

import nemo_absent

nemo_absent.install()

import numpy as np
import ray
from nemo_rl.distributed.ray_actor_environment_registry import ACTOR_ENVIRONMENT_REGISTRY
from nemo_rl.distributed.virtual_cluster import PY_EXECUTABLES, RayVirtualCluster
from nemo_sim_worker import SIM_WORKER, generate_all
from test_nemo_rl_contract import config

from kvrouter.integrations import nemo_rl as integration
from kvrouter.integrations.nemo_rl import seams
from kvrouter.ray.local_cluster import local_ray

LENGTH = 1600


def counters(generation):
    found = np.asarray(generation._on_leaders("kvrouter_cache_counters"))
    return found.sum(axis=0)


def measure(generation, rollouts):
    """Sends each rollout when the one before is done; hit rate by the workers' counters, requests/s."""
    generation.finish_generation()
    before, began = counters(generation), time.perf_counter()
    for prompts in rollouts:
        asyncio.run(generate_all(generation, prompts))
    seconds = time.perf_counter() - began
    queries, hits = counters(generation) - before
    return {
        "hit_rate": round(float(hits / queries), 4),
        "requests_per_s": round(sum(map(len, rollouts)) / seconds, 2),
    }


def groups(prompts, samples, seed):
    ids = np.random.default_rng(seed).integers(3, 1000, (prompts, LENGTH))
    return [[list(of) for of in ids for _ in range(samples)]]


def conversations(count, turns, seed):
    ids = np.random.default_rng(seed).integers(3, 1000, (count, LENGTH))
    order = np.random.default_rng(seed + 1)
    grown = [np.linspace(LENGTH // 2, LENGTH, turns).astype(int)[turn] for turn in range(turns)]
    return [[list(ids[n][:length]) for n in order.permutation(count)] for length in grown]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    of = config()
    of["sim_cfg"] = {"time_scale": 1.0, "num_blocks": 448}
    ACTOR_ENVIRONMENT_REGISTRY[SIM_WORKER] = PY_EXECUTABLES.SYSTEM
    seams.ROUTED_WORKER = SIM_WORKER
    with local_ray(cpus_per_node=options.workers + 2):
        integration.enable()
        from nemo_rl.algorithms import grpo

        cluster = RayVirtualCluster([options.workers], use_gpus=False, num_gpus_per_node=options.workers)
        generation = grpo.VllmGeneration(cluster, of)
        decisions = generation._decisions
        results = []
        for repeat in range(options.repeats):
            work = {
                "groups": groups(options.prompts, options.samples, repeat),
                "conversations": conversations(options.prompts * 2, options.turns, repeat),
            }
            for name, rollouts in work.items():
                for router in ("on", "off") if repeat % 2 else ("off", "on"):
                    generation._decisions = decisions if router == "on" else None
                    row = {"workload": name, "router": router, "repeat": repeat, **measure(generation, rollouts)}
                    results.append(row)
                    print(json.dumps(row), flush=True)
        for name in ("groups", "conversations"):
            for router in ("off", "on"):
                rows = [row for row in results if (row["workload"], row["router"]) == (name, router)]
                medians = {key: float(np.median([row[key] for row in rows])) for key in ("hit_rate", "requests_per_s")}
                print(json.dumps({"median": name, "router": router, **medians}))
        generation.shutdown()
        cluster.shutdown()
        integration.disable()
    ray.shutdown()


if __name__ == "__main__":
    main()
