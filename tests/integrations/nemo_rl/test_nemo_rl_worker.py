"""What the mix-in adds to NeMo-RL's worker, piece by piece."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from test_nemo_rl_contract import config

from kvrouter.integrations.nemo_rl import worker as routed
from kvrouter.integrations.nemo_rl.worker import PublishingWorker, RoutedVllmAsyncGenerationWorkerImpl

pytest.importorskip("vllm", reason="vLLM is not installed: scripts/install_vllm.py")


class Base:
    """A worker whose engine is whatever a test makes of it."""

    def __init__(self, config, bundle_indices=None):
        self.cfg = config

    def _setup_vllm_openai_api_server(self, app):
        return app

    def _create_engine(self, llm_kwargs):
        self.llm_kwargs = llm_kwargs
        self.stat_loggers = ["nemo's"]
        self.given = self.stat_loggers

        async def reset_prefix_cache(**options):
            return self.emptied

        self.llm = SimpleNamespace(reset_prefix_cache=reset_prefix_cache)


class Worker(PublishingWorker, Base):
    pass


@pytest.fixture
def make(monkeypatch):
    made = []

    def make_worker(of=None, bundle_indices=(0,), rank=0):
        monkeypatch.setenv("RANK", str(rank))
        made.append(Worker(of or config(), list(bundle_indices) if bundle_indices is not None else None))
        return made[-1]

    yield make_worker
    for worker in made:
        if worker._kvrouter_claim is not None:
            worker._kvrouter_claim.release()


def test_workers_of_a_node_publish_apart(make, monkeypatch):
    monkeypatch.setattr(routed.ray.util, "get_node_ip_address", lambda: "10.0.0.7")
    of = config()
    base = of["router_cfg"]["base_kv_events_port"]
    first, second, clash = make(of), make(of, rank=1), make(of, rank=1)
    publishers = [worker.kvrouter_publishers() for worker in (first, second, clash)]
    assert [at.ports.kv_events for at in publishers[:2]] == [base, base + 1]
    assert len({port for at in publishers for port in (at.ports.kv_events, at.ports.load, at.ports.replay)}) == 9
    assert all(at.ports.load - at.ports.kv_events == 32 and at.node_ip == "10.0.0.7" for at in publishers)


def test_the_rank_is_that_of_the_engine(make):
    of = config(tensor_parallel_size=2)
    assert make(of, (2, 3), rank=2)._kvrouter_claim.ports.kv_events == of["router_cfg"]["base_kv_events_port"] + 1
    # The other rank of the engine is no engine.
    assert make(of, None, rank=3)._kvrouter_claim is None


def test_the_engine_is_told_to_publish(make, monkeypatch):
    from kvrouter.vllm.load_channel import ENDPOINT_VARIABLE

    monkeypatch.setenv(ENDPOINT_VARIABLE, "tcp://*:1")
    worker = make()
    worker._create_engine({"model": "m", "enable_prefix_caching": False})
    ports = worker._kvrouter_claim.ports
    events = worker.llm_kwargs["kv_events_config"]
    assert events.endpoint == f"tcp://*:{ports.kv_events}" and events.replay_endpoint == f"tcp://*:{ports.replay}"
    assert events.enable_kv_cache_events and worker.llm_kwargs["enable_prefix_caching"] is True
    assert worker.llm_kwargs["block_size"] == 64
    nemo, counters, load = worker.given
    assert nemo == "nemo's" and counters is worker._kvrouter_counters
    assert load.keywords == {"endpoint": f"tcp://*:{ports.load}"}
    assert ENDPOINT_VARIABLE not in routed.os.environ


def test_a_block_size_of_ones_own_is_kept(make):
    worker = make()
    worker._create_engine({"block_size": 16})
    assert worker.llm_kwargs["block_size"] == 16


def test_whether_the_cache_was_emptied_is_known(make):
    worker = make()
    worker._create_engine({})
    for emptied in (True, False):
        worker.emptied = emptied
        assert asyncio.run(worker.llm.reset_prefix_cache(reset_running_requests=False)) is emptied
        assert worker.kvrouter_emptied() is emptied


def test_the_http_server_has_what_a_gateway_asks_for(make):
    worker = make()
    worker.cfg = {"model_name": "a/model"}
    alive = True

    async def check_health():
        if not alive:
            raise RuntimeError("the engine is dead")

    worker.llm = SimpleNamespace(check_health=check_health)
    client = TestClient(worker._setup_vllm_openai_api_server(FastAPI()))
    assert client.get("/health").status_code == 200
    alive = False
    assert client.get("/health").status_code == 503
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["a/model"]
    assert client.get("/metrics").headers["content-type"].startswith("text/plain")


def test_nemo_rls_worker_calls_what_the_mix_in_overrides():
    order = [cls.__name__ for cls in RoutedVllmAsyncGenerationWorkerImpl.__mro__]
    assert order.index("PublishingWorker") < order.index("VllmAsyncGenerationWorkerImpl")
    for name in ("_create_engine", "_setup_vllm_openai_api_server", "stat_loggers"):
        assert name in vars(PublishingWorker)
