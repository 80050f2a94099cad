"""Real workers for the end-to-end tests, started once for the whole session."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import util
from pathlib import Path

import pytest

from kvrouter.vllm.engines import load_plugin_installed, vllm_installed
from kvrouter.vllm.launcher import WorkerFleet, launch_workers
from kvrouter.vllm.tiny_model import TinyModel, make_tiny_model

NUM_WORKERS = 2


def why_no_vllm() -> str | None:
    """Why tests on real workers cannot run here; None when they can."""
    if not vllm_installed():
        return "vLLM is not installed: run scripts/install_vllm.py"
    if not load_plugin_installed():
        return "kvrouter is not installed, so vLLM cannot find its load publisher: run pip install ."
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = why_no_vllm()
    for item in items:
        if reason and item.get_closest_marker("vllm"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A model of two layers: quick to start and to run."""
    return make_tiny_model(tmp_path_factory.mktemp("model"), num_layers=2)


@pytest.fixture(scope="session")
def vllm_fleet(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerFleet]:
    """Two healthy vLLM workers, block size 64, with KV events and load.  Who kills one restarts it."""
    reason = why_no_vllm()
    if reason:
        pytest.skip(reason)
    logs = tmp_path_factory.mktemp("vllm-logs")
    chat = ("--trust-request-chat-template",)  # the model has none of its own
    with launch_workers(NUM_WORKERS, engine="vllm", model=tiny_model, log_dir=logs, extra_args=chat) as fleet:
        yield fleet


@pytest.fixture(scope="session")
def sim_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerFleet]:
    """Two healthy embedded workers, block size 64.  Who kills one restarts it."""
    if util.find_spec("kvrouter.sim") is None:
        pytest.skip("kvrouter.sim is not installed")
    logs = tmp_path_factory.mktemp("sim-logs")
    with launch_workers(NUM_WORKERS, engine="sim", log_dir=logs, startup_timeout_s=60) as fleet:
        yield fleet


@pytest.fixture(scope="session")
def ray_node() -> Iterator[None]:
    """Ray, one node that says it has 16 CPUs, gone with the session."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'kvrouter[ray]'")
    from kvrouter.ray.local_cluster import local_ray

    with local_ray(cpus_per_node=16):
        yield


@pytest.fixture(scope="session")
def ray_sim_fleet(ray_node: None) -> Iterator[object]:
    """``VllmGeneration`` over two simulated engines.  Who kills a worker waits until it is back."""
    from ray_support import cluster, sim_config

    from kvrouter.ray import VllmGeneration

    place = cluster()
    with VllmGeneration(place, sim_config()) as fleet:
        yield fleet
    place.shutdown()


@pytest.fixture
def generation(ray_sim_fleet):
    """The same with empty caches, and a router that runs."""
    ray_sim_fleet.invalidate_kv_cache()
    ray_sim_fleet.prepare_for_generation()
    ray_sim_fleet.router_metrics(clear=True)
    return ray_sim_fleet


@pytest.fixture
def processes_under() -> object:
    """A function from a process id to the ids of all processes below it, itself included."""

    def find(root: int) -> list[int]:
        children: dict[int, list[int]] = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                fields = (entry / "stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] not in ("Z", "X"):
                children.setdefault(int(fields[1]), []).append(int(entry.name))
        found, unvisited = [root], [root]
        while unvisited:
            below = children.get(unvisited.pop(), [])
            found += below
            unvisited += below
        return found

    return find
