"""NeMo-RL's VllmGeneration and its own worker code over two real vLLM engines on the CPU."""

from __future__ import annotations

import asyncio

import pytest
from nemo_cpu_worker import CPU_WORKER
from nemo_rl.distributed.ray_actor_environment_registry import ACTOR_ENVIRONMENT_REGISTRY
from nemo_rl.distributed.virtual_cluster import PY_EXECUTABLES, RayVirtualCluster
from nemo_sim_worker import generate_all
from test_nemo_rl_contract import blocks, config, prompts, until

from kvrouter.integrations import nemo_rl as integration
from kvrouter.integrations.nemo_rl import seams
from kvrouter.ray.local_cluster import local_ray
from kvrouter.vllm import make_tiny_model

pytestmark = pytest.mark.vllm
WORKERS = 2


@pytest.fixture(scope="module")
def generation(tmp_path_factory):
    model = make_tiny_model(tmp_path_factory.mktemp("model"))
    of = config(
        expose_http_server=False,
        precision="float32",
        enforce_eager=True,
        load_format="dummy",
        max_model_len=1024,
    )
    of["model_name"] = str(model.path)
    of["ignore_eos"] = True
    of["vllm_kwargs"] = {
        "tokenizer": str(model.tokenizer),
        "num_gpu_blocks_override": 256,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 1024,
    }
    patch = pytest.MonkeyPatch()
    patch.setitem(ACTOR_ENVIRONMENT_REGISTRY, CPU_WORKER, PY_EXECUTABLES.SYSTEM)
    patch.setattr(seams, "ROUTED_WORKER", CPU_WORKER)
    with local_ray(cpus_per_node=8):
        integration.enable()
        from nemo_rl.algorithms import grpo

        cluster = RayVirtualCluster([WORKERS], use_gpus=False, num_gpus_per_node=WORKERS, name="real")
        made = grpo.VllmGeneration(cluster, of, name_prefix="real")
        yield made
        made.shutdown()
        cluster.shutdown()
        integration.disable()
    patch.undo()


def test_samples_of_a_prompt_stay_where_its_prefix_is(generation):
    assert generation.router is not None
    generation.snapshot_step_metrics()
    generation.get_step_metrics()
    of_groups = prompts(2, 4, seed=1)
    workers = [worker for worker, _ in asyncio.run(generate_all(generation, of_groups))]
    assert len(set(workers[:4])) == len(set(workers[4:])) == 1
    until(lambda: blocks(generation) >= 2 * 4, "KV events of the two engines")
    again = asyncio.run(generate_all(generation, of_groups[::4]))
    assert [worker for worker, _ in again] == workers[::4]
    figures = generation.get_step_metrics()
    assert figures["router/decisions"] == 10
    assert figures["router/engine_hit_rate"] > 0.3
    assert {worker["load_source"] for worker in generation.router.status()["workers"]} == {"messages"}


def test_emptying_the_caches_empties_the_router_and_the_engines_agree(generation):
    assert generation.finish_generation()
    assert blocks(generation) == 0
    assert generation._on_leaders("kvrouter_emptied") == [True] * WORKERS
    asyncio.run(generate_all(generation, prompts(2, 1, seed=2)))
    until(lambda: blocks(generation) >= 2 * 4, "KV events after the reset")
