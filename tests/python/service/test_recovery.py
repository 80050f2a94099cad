"""What the router has missed of a worker's KV events is replayed by the worker: its belief becomes exact again."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import Iterator

from chaos.fleet import free_ports
from chaos.proxies import Link
from conftest import BLOCK_SIZE, Client, sim_worker, wait_for
from kvrouter import KvRouter
from kvrouter.sim import SimWorker


def port_of(endpoint: str) -> int:
    return int(endpoint.rpartition(":")[2])


def router_of(worker: SimWorker, kv_events_port: int) -> KvRouter:
    return KvRouter(
        block_size=BLOCK_SIZE,
        num_workers=1,
        base_kv_events_port=kv_events_port,
        base_metrics_port=port_of(worker.load_endpoint),
        worker_addresses=["127.0.0.1"],
        replay=[worker.replay_endpoint],
    )


@contextlib.contextmanager
def link_to(port: int) -> Iterator[Link]:
    """A link in front of a publisher, in a loop of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    link = Link(free_ports(1)[0], port, random.Random(0), messages=True)
    asyncio.run_coroutine_threadsafe(link.listen(), loop).result(30)
    try:
        yield link
    finally:
        loop.call_soon_threadsafe(link.cut)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


def complete(worker: Client, first: int, count: int) -> None:
    for number in range(first, first + count):
        body = {"model": "sim", "prompt": [number] * (3 * BLOCK_SIZE), "max_tokens": 1}
        worker.json("POST", "/v1/completions", body)


def held(worker: Client) -> set[int]:
    return set(worker.json("GET", "/debug/blocks")["blocks"])


def test_router_that_starts_late_learns_what_the_worker_holds():
    with sim_worker(debug=True, num_blocks=65, replay_endpoint="tcp://127.0.0.1:*") as worker:
        client = Client(f"http://127.0.0.1:{worker.port}")
        complete(client, 3, 40)
        with router_of(worker, port_of(worker.kv_events_endpoint)) as router:
            assert len(held(client)) > 20
            assert wait_for(lambda: set(router.worker_blocks(0).tolist()) == held(client))


def test_lost_events_are_replayed_the_last_one_too():
    with sim_worker(debug=True, num_blocks=65, replay_endpoint="tcp://127.0.0.1:*") as worker:
        client = Client(f"http://127.0.0.1:{worker.port}")
        with link_to(port_of(worker.kv_events_endpoint)) as link, router_of(worker, link.port) as router:
            complete(client, 3, 5)
            assert wait_for(lambda: set(router.worker_blocks(0).tolist()) == held(client))
            link.faults.lost = 0.5
            complete(client, 20, 40)
            link.faults.lost = 1.0
            complete(client, 80, 2)  # nothing that comes after these shows that they are missing
            assert link.messages_lost > 5
            assert wait_for(lambda: set(router.worker_blocks(0).tolist()) == held(client))
