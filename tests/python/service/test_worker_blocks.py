"""What the router believes a worker to hold can be asked for, and is what the worker holds."""

from __future__ import annotations

import pytest

from conftest import BLOCK_SIZE, Client, served, sim_worker, spec_of, wait_for
from kvrouter import KvRouter


def complete(client: Client, prompt: list[int]) -> None:
    client.json("POST", "/v1/completions", {"model": "sim", "prompt": prompt, "max_tokens": 1})


def test_service_and_router_name_the_blocks_that_the_worker_names():
    with sim_worker(debug=True, num_blocks=65) as worker, served([spec_of(worker)]) as client:
        at_worker = Client(f"http://127.0.0.1:{worker.port}")
        ports = [int(worker.kv_events_endpoint.rpartition(":")[2]), int(worker.load_endpoint.rpartition(":")[2])]
        router = KvRouter(
            block_size=BLOCK_SIZE,
            num_workers=1,
            base_kv_events_port=ports[0],
            base_metrics_port=ports[1],
            worker_addresses=["127.0.0.1"],
        )
        with router:
            assert router.wait_until_connected(30)
            for number in range(30):  # more than the cache has room for
                complete(client, [number + 3] * (5 * BLOCK_SIZE))
            held = at_worker.json("GET", "/debug/blocks")
            assert 20 < len(held["blocks"]) <= 64
            assert wait_for(lambda: set(client.json("GET", "/workers/0/blocks")["blocks"]) == set(held["blocks"]))
            assert wait_for(lambda: set(router.worker_blocks(0).tolist()) == set(held["blocks"]))
            with pytest.raises((IndexError, ValueError)):
                router.worker_blocks(1)
        assert client.ask("GET", "/workers/3/blocks")[0] == 404
        assert client.ask("POST", "/workers/0/blocks")[0] == 405
        assert client.ask("GET", "/workers/0/block")[0] == 404
