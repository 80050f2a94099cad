"""NeMo-RL's own VllmGeneration, worker group and virtual cluster, with simulated workers in Ray actors."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import pickle
import time
import urllib.request

import numpy as np
import pytest
from nemo_rl.distributed.ray_actor_environment_registry import ACTOR_ENVIRONMENT_REGISTRY
from nemo_rl.distributed.virtual_cluster import PY_EXECUTABLES, RayVirtualCluster
from nemo_sim_worker import PLAIN_SIM_WORKER, SIM_WORKER, batch_of, generate_all

from kvrouter.integrations import nemo_rl as integration
from kvrouter.integrations.nemo_rl import seams
from kvrouter.ray.local_cluster import local_ray
from kvrouter.vllm.ports import find_free_ports

WORKERS = 2
_numbers = itertools.count()
#: A copy of a generation object that is deleted ends its workers and their placement group, as NeMo-RL's own does.
_kept = []


@pytest.fixture(scope="module")
def ray_nodes():
    with local_ray(cpus_per_node=8):
        yield


@pytest.fixture(scope="module")
def sim_workers():
    """NeMo-RL starts simulated workers, the integration's own class of them where a router is asked for."""
    from nemo_rl.models.generation.vllm import vllm_generation

    patch = pytest.MonkeyPatch()
    for name in (SIM_WORKER, PLAIN_SIM_WORKER):
        patch.setitem(ACTOR_ENVIRONMENT_REGISTRY, name, PY_EXECUTABLES.SYSTEM)
    patch.setattr(seams, "ROUTED_WORKER", SIM_WORKER)
    patch.setattr(seams, "NEMO_WORKER", PLAIN_SIM_WORKER)
    patch.setattr(vllm_generation, "resolve_generation_worker_cls", lambda default_cls, config: PLAIN_SIM_WORKER)
    yield
    patch.undo()


def config(router=True, **vllm_cfg):
    ports = find_free_ports(64)
    base = ports.base
    ports.release()
    return {
        "backend": "vllm",
        "model_name": "sim",
        "max_new_tokens": 4,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": None,
        "val_temperature": 1.0,
        "val_top_p": 1.0,
        "val_top_k": None,
        "stop_token_ids": None,
        "stop_strings": None,
        "_pad_token_id": 0,
        "colocated": {"enabled": False, "resources": {"gpus_per_node": None, "num_nodes": None}},
        "vllm_cfg": {
            "async_engine": True,
            "tensor_parallel_size": 1,
            "pipeline_parallel_size": 1,
            "expert_parallel_size": 1,
            "gpu_memory_utilization": 0.5,
            "max_model_len": 4096,
            "skip_tokenizer_init": True,
            "kv_cache_dtype": "auto",
            **vllm_cfg,
        },
        "sim_cfg": {"time_scale": 0.05},
        "router_cfg": {
            "enabled": router,
            "block_size": 64,
            "base_kv_events_port": base,
            "base_metrics_port": base + 32,
        },
    }


def make(of, **options):
    from nemo_rl.algorithms import grpo

    name = f"test{next(_numbers)}"
    cluster = RayVirtualCluster([WORKERS], use_gpus=False, num_gpus_per_node=WORKERS, name=name)
    return grpo.VllmGeneration(cluster, of, name_prefix=name, **options), cluster


@pytest.fixture(scope="module")
def generation(ray_nodes, sim_workers):
    integration.enable()
    made, cluster = make(config())
    yield made
    made.shutdown()
    cluster.shutdown()
    integration.disable()


def prompts(groups, samples, seed=0, length=300):
    ids = np.random.default_rng(seed).integers(3, 1000, (groups, length))
    return [list(ids[group]) for group in range(groups) for _ in range(samples)]


def until(condition, what):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.05)


def blocks(generation):
    return sum(worker["cached_blocks"] for worker in generation.router.status()["workers"])


def test_generate_async_asks_the_router_and_groups_stay_together(generation):
    generation.snapshot_step_metrics()
    generation.get_step_metrics()
    of_groups = prompts(4, 8, seed=1)
    first = asyncio.run(generate_all(generation, of_groups))
    workers = [worker for worker, _ in first]
    assert [length for _, length in first] == [4] * 32
    for group in range(4):
        assert len(set(workers[group * 8 : group * 8 + 8])) == 1, "the samples of a prompt went to different workers"
    until(lambda: blocks(generation) >= 4 * 4, "the events of the four prompts")
    # In another loop, as NeMo-RL's next rollout: each goes where its prefix is.
    again = asyncio.run(generate_all(generation, of_groups[::8]))
    assert [worker for worker, _ in again] == workers[::8]
    generation.snapshot_step_metrics()
    figures = generation.get_step_metrics()
    assert figures["router/decisions"] == 36
    assert figures["router/workers_up"] == WORKERS
    assert figures["router/engine_hit_rate"] > 0.5
    assert figures["router/predicted_hit_rate"] > 0.5
    assert all(isinstance(value, float) for value in figures.values())


@pytest.mark.parametrize("empty", ["finish_generation", "invalidate_kv_cache", "update_weights_from_collective"])
def test_what_empties_caches_empties_the_router(generation, empty):
    seed = 20 + len(empty)
    before = blocks(generation)
    asyncio.run(generate_all(generation, prompts(2, 1, seed)))
    until(lambda: blocks(generation) >= before + 2 * 4, "the events of two prompts")
    assert getattr(generation, empty)()
    assert blocks(generation) == 0
    # It learns again.
    asyncio.run(generate_all(generation, prompts(2, 1, seed + 100)))
    until(lambda: blocks(generation) >= 2 * 4, "events after the reset")


def test_a_refit_of_caches_known_to_be_empty_leaves_the_fence_up(generation):
    generation.finish_generation()
    told = []
    generation.router.__dict__["reset"] = lambda *args, **kwargs: told.append(args)
    try:
        generation.update_weights_from_collective()
    finally:
        del generation.router.__dict__["reset"]
    assert told == []


def test_a_copy_in_another_process_asks_the_same_router(generation):
    before = generation.router.status()["decisions"]
    copy = pickle.loads(pickle.dumps(generation))
    _kept.append(copy)
    assert not copy.router.is_here
    asyncio.run(generate_all(copy, prompts(2, 2, seed=4)))
    assert generation.router.status()["decisions"] == before + 4


def test_a_router_that_does_not_answer_costs_only_locality(generation, monkeypatch):
    async def fail(prompts):
        return None

    monkeypatch.setattr(generation.router, "choose", fail)
    answers = asyncio.run(generate_all(generation, prompts(4, 1, seed=5)))
    assert sorted(worker for worker, _ in answers) == [0, 0, 1, 1]


def test_a_quarantined_worker_is_sent_nothing(generation):
    from nemo_rl.models.generation.fleet_health import FleetHealthPolicy, GenerationFleetHealth, HealthyShardSelector

    monitor = GenerationFleetHealth(shard_count=WORKERS, policy=FleetHealthPolicy(unhealthy_threshold=1))
    generation.attach_fleet_health(monitor, HealthyShardSelector(monitor=monitor))
    try:
        monitor.record_probe(0, ok=False, error="for the test")
        answers = asyncio.run(generate_all(generation, prompts(6, 1, seed=6)))
        assert {worker for worker, _ in answers} == {1}
    finally:
        generation.fleet_monitor = generation.fleet_selector = None


def test_an_abandoned_request_is_closed(generation):
    async def begin_and_leave():
        results = generation.generate_async(batch_of(prompts(1, 1, seed=7)[0]))
        await anext(results)
        await results.aclose()

    asyncio.run(begin_and_leave())
    assert generation.router.status()["account"]["requests"] == 0


def test_gym_is_given_the_gateway(ray_nodes, sim_workers, enabled):
    generation, cluster = make(config(expose_http_server=True))
    try:
        (url,) = generation.dp_openai_server_base_urls
        assert generation.worker_server_base_urls != [url] and len(generation.worker_server_base_urls) == WORKERS
        prompt = [int(token) for token in prompts(1, 1, seed=8)[0]]
        body = json.dumps({"model": "sim", "prompt": prompt, "max_tokens": 2}).encode()

        def ask():
            request = urllib.request.Request(f"{url}/completions", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as answer:
                return int(answer.headers["x-kvrouter-overlap-blocks"])

        until(lambda: ask() == 4, "the gateway to know the prompt's four blocks")
        assert all(ask() == 4 for _ in range(4))
    finally:
        generation.shutdown()
        cluster.shutdown()


def test_deferred_loading(ray_nodes, sim_workers, enabled):
    generation, cluster = make(config(expose_http_server=True), defer_model_load=True)
    try:
        (url,) = generation.dp_openai_server_base_urls  # known, and lasting, before any model is loaded
        assert generation.router is None
        generation.load_and_start()
        assert generation.dp_openai_server_base_urls == [url]
        assert generation.router is not None
        assert len(asyncio.run(generate_all(generation, prompts(2, 1)))) == 2
    finally:
        generation.shutdown()
        cluster.shutdown()


def test_without_router_cfg_nothing_is_different(ray_nodes, sim_workers, enabled):
    generation, cluster = make(config(router=False))
    try:
        assert generation.router is None and not generation.router_enabled
        answers = [asyncio.run(generate_all(generation, prompts(1, 1)))[0][0] for _ in range(4)]
        assert answers == [0, 1, 0, 1]
        generation.snapshot_step_metrics()
        assert not [name for name in generation.get_step_metrics() if name.startswith("router/")]
        assert generation.finish_generation()
    finally:
        generation.shutdown()
        cluster.shutdown()


# --- enabling and disabling ---


@pytest.mark.parametrize("seam", seams.RELIED_ON, ids=lambda seam: f"{seam.module.split('.')[-1]}.{seam.name}")
def test_seam_is_where_it_was(seam):
    assert seam.difference() is None


@pytest.mark.parametrize("seam", seams.RELIED_ON, ids=lambda seam: f"{seam.module.split('.')[-1]}.{seam.name}")
def test_seam_that_moves_is_noticed(seam):
    moved = dataclasses.replace(seam, name=seam.name + "_as_it_was")
    assert "is not there" in moved.difference()
    if seam.parameters:
        assert "takes" in dataclasses.replace(seam, parameters=(*seam.parameters, "new")).difference()
    if seam.uses:
        assert "no longer uses new" in dataclasses.replace(seam, uses=(*seam.uses, "new")).difference()


def snapshot():
    from nemo_rl.algorithms import grpo
    from nemo_rl.models.generation import vllm
    from nemo_rl.models.generation.vllm import vllm_generation, vllm_worker_async

    owners = (grpo, vllm, vllm_generation, vllm_generation.VllmGeneration, vllm_worker_async)
    return [dict(vars(owner)) for owner in owners], dict(ACTOR_ENVIRONMENT_REGISTRY)


def same(before, after):
    (vars_before, registry_before), (vars_after, registry_after) = before, after
    return registry_before == registry_after and all(
        old.keys() == new.keys() and all(old[name] is new[name] for name in old)
        for old, new in zip(vars_before, vars_after, strict=True)
    )


def test_disable_puts_back_the_identical_objects():
    integration.disable()
    before = snapshot()
    integration.enable()
    assert integration.is_enabled() and not same(before, snapshot())
    integration.enable()
    integration.disable()
    integration.disable()
    assert not integration.is_enabled() and same(before, snapshot())


@pytest.mark.parametrize("change", ["version", "seam"])
def test_an_unknown_nemo_rl_is_refused_and_left_alone(monkeypatch, change):
    from nemo_rl import package_info
    from nemo_rl.models.generation.vllm.vllm_generation import VllmGeneration

    if change == "version":
        monkeypatch.setattr(package_info, "__shortversion__", "9.9.9")
        named = "its version is 9.9.9"
    else:
        monkeypatch.delattr(VllmGeneration, "_next_dp_shard_idx")
        named = "_next_dp_shard_idx is not there"
    before = snapshot()
    with pytest.raises(integration.UnsupportedNemoRlError, match=named):
        integration.enable()
    assert same(before, snapshot()) and not integration.is_enabled()


def test_grpo_router_reaches_the_generation_config(enabled):
    from types import SimpleNamespace

    from nemo_rl.algorithms import grpo
    from nemo_rl.algorithms.grpo import GRPOConfig

    router = {"enabled": True, "block_size": 16, "base_kv_events_port": 6000, "base_metrics_port": 6100}
    assert GRPOConfig.model_construct(router=router).router == router  # NeMo-RL keeps keys that it does not know
    generation = {"backend": "vllm", "router_cfg": {"enabled": False, "policy": "linear"}}
    master = SimpleNamespace(grpo=SimpleNamespace(router=router), policy={"generation": generation})
    with pytest.raises(AttributeError, match="loss_fn"):  # setup itself has begun
        grpo.setup(master, None, None, None)
    assert generation["router_cfg"] == {**router, "policy": "linear"}


def test_the_guides_import_paths(monkeypatch):
    from kvrouter import KvRouter
    from kvrouter.integrations.nemo_rl import import_paths
    from kvrouter.ray import RoutedVllmWorkerGroup

    # Today's main has the package, for another backend: it is left alone.
    assert import_paths.install() is False
    # A NeMo-RL without it:
    monkeypatch.setattr(import_paths.importlib.util, "find_spec", lambda name: None)
    for name in [name for name in import_paths.sys.modules if name.startswith(import_paths.PACKAGE)]:
        monkeypatch.delitem(import_paths.sys.modules, name)
    import nemo_rl.models.generation as parent

    monkeypatch.delattr(parent, "dynamo", raising=False)
    assert import_paths.install() is True
    from nemo_rl.models.generation.dynamo.routed_worker_group import RoutedVllmWorkerGroup as FromGuide
    from nemo_rl.models.generation.dynamo.standalone_router import KvRouter as RouterFromGuide

    assert RouterFromGuide is KvRouter and FromGuide is RoutedVllmWorkerGroup
    import_paths.remove()
    assert not hasattr(parent, "dynamo")


def test_a_script_runs_with_the_integration_and_its_own_arguments(tmp_path, monkeypatch):
    import sys

    from kvrouter.integrations.nemo_rl.__main__ import main
    from kvrouter.integrations.nemo_rl.generation import RoutedVllmGeneration

    script = tmp_path / "run.py"
    script.write_text(
        "import sys\n"
        "from nemo_rl.algorithms.grpo import VllmGeneration, setup\n"
        "import beside\n"
        "beside.found = (__name__, sys.argv[1:], VllmGeneration, setup.__wrapped__)\n"
    )
    (tmp_path / "beside.py").write_text("")
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    try:
        main([str(script), "--config", "x.yaml", "grpo.router.enabled=true"])
    finally:
        integration.disable()
    name, arguments, generation_class, _ = sys.modules.pop("beside").found
    assert (name, arguments) == ("__main__", ["--config", "x.yaml", "grpo.router.enabled=true"])
    assert generation_class is RoutedVllmGeneration
