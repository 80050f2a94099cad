"""The request router in a real Ray Serve: deployments whose replicas have a simulated engine each."""

from __future__ import annotations

import sys
import time

import pytest

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'kvrouter[ray]'")
pytest.importorskip(
    "grpc_reflection", reason="Ray Serve is not installed: pip install -r requirements/ray-serve-test.txt"
)

from ray import serve  # noqa: E402
from ray.serve.config import RequestRouterConfig  # noqa: E402

from kvrouter.integrations.ray_serve import KvRequestRouter  # noqa: E402
from kvrouter.integrations.ray_serve.prompts import prompt_tokens  # noqa: E402
from kvrouter.ray.local_cluster import local_ray  # noqa: E402

BLOCK = 16


class SimReplica:
    """An engine behind a replica: says where its KV events are, and who served a prompt with how many hits."""

    def __init__(self, tell_events=True):
        import aiohttp

        from kvrouter.sim import SimWorker

        self._worker = SimWorker(kv_events_endpoint="tcp://127.0.0.1:0", block_size=BLOCK, num_blocks=600, time_scale=0)
        self._tell_events = tell_events
        self._new_session, self._session = aiohttp.ClientSession, None
        self.name = serve.get_replica_context().replica_id.unique_id

    def record_routing_stats(self):
        metadata = {"endpoint": self._worker.kv_events_endpoint, "replay_endpoint": None, "block_size": BLOCK}
        return {"kv_event_metadata": metadata} if self._tell_events else {}

    async def generate(self, request):
        self._session = self._session or self._new_session()
        body = {"model": "sim", "prompt": request["prompt"], "max_tokens": 1}
        async with self._session.post(f"http://127.0.0.1:{self._worker.port}/v1/completions", json=body) as answer:
            usage = (await answer.json())["usage"]
        return self.name, (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


@pytest.fixture(scope="module")
def serving():
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the replicas cannot import a test
    with local_ray(cpus_per_node=16):
        serve.start(proxy_location="Disabled")
        yield
        serve.shutdown()


def deploy(name, tell_events=True, max_ongoing_requests=100):
    deployment = serve.deployment(
        SimReplica,
        name=name,
        num_replicas=2,
        max_ongoing_requests=max_ongoing_requests,
        ray_actor_options={"num_cpus": 0.1},
        request_router_config=RequestRouterConfig(
            request_router_class="kvrouter.integrations.ray_serve.KvRequestRouter",
            request_router_kwargs={"block_size": BLOCK},
            request_routing_stats_period_s=0.1,
        ),
    )
    return serve.run(deployment.bind(tell_events), name=name, route_prefix=None)


def prompt(seed, blocks=8):
    return [3 + (seed * 7919 + n * 31) % 500 for n in range(blocks * BLOCK + 1)]


def ask(handle, tokens):
    return handle.generate.remote({"prompt": tokens}).result(timeout_s=60)


@pytest.mark.parametrize("tell_events", [True, False])
def test_a_prompt_goes_where_its_prefix_is_cached(serving, tell_events):
    handle = deploy(f"sim-{tell_events}", tell_events)
    homes, settled, deadline = {}, 0, time.monotonic() + 60
    # What was stored before the router subscribed to a replica's events is not known: once more, then.
    while settled < 3:
        assert time.monotonic() < deadline, "prompts do not go where they are cached"
        served = {seed: ask(handle, prompt(seed)) for seed in range(12)}
        stayed = {seed: server for seed, (server, _) in served.items()} == homes
        homes = {seed: server for seed, (server, _) in served.items()}
        settled = settled + 1 if stayed and all(cached == 8 * BLOCK for _, cached in served.values()) else 0
    assert len(set(homes.values())) == 2


class Elsewhere:
    """A process with a handle, and so a router, of its own."""

    def __init__(self, app):
        self._handle = serve.get_app_handle(app)

    def ask(self, tokens):
        return ask(self._handle, tokens)


def test_what_a_replica_caches_is_learnt_from_its_events(serving):
    handle = deploy("sim-learn")
    elsewhere = ray.remote(num_cpus=0.1)(Elsewhere).remote("sim-learn")
    in_a_row, seed, deadline = 0, 0, time.monotonic() + 90
    while in_a_row < 10:
        assert time.monotonic() < deadline, "another router does not learn from KV events where prompts are cached"
        seed += 1
        home, _ = ask(handle, prompt(seed))
        found = ray.get(elsewhere.ask.remote(prompt(seed)))
        in_a_row = in_a_row + 1 if found == (home, 8 * BLOCK) else 0


def test_requests_without_token_ids_are_served_all_the_same(serving):
    handle = deploy("sim-text")
    served = {ask(handle, "w5 w6 w7")[0] for _ in range(40)}
    assert len(served) == 2


def test_where_token_ids_are_found():
    class Request:
        prompt = (4, 5)

    assert prompt_tokens([], {"request_token_ids": [1, 2]}) == [1, 2]
    assert prompt_tokens([{"prompt": [3, 4]}], {}) == [3, 4]
    assert prompt_tokens([{"prompt": "text"}], {}) is None
    assert prompt_tokens([{"prompt": [[1, 2], [3]]}], {}) is None
    assert prompt_tokens([Request()], {"x": {"prompt_token_ids": [9]}}) == [9]
    assert prompt_tokens([], {}) is None


def test_the_router_is_a_request_router():
    from ray.serve.request_router import RequestRouter

    assert issubclass(KvRequestRouter, RequestRouter)
