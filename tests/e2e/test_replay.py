"""KV events that were lost, or published before the router listened: a router that asks for replays knows what an
undisturbed one knows.

Each test runs on simulated workers and, marked ``vllm``, on real ones.
"""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
import zmq
from test_router_on_workers import BLOCK, complete, eventually, router_for

from kvrouter import KvRouter
from kvrouter.vllm.launcher import WorkerFleet

ENGINES = ["sim", pytest.param("vllm", marks=pytest.mark.vllm)]


@pytest.fixture(params=ENGINES)
def fleet(request):
    return request.getfixturevalue(f"{request.param}_fleet")


class LossyProxy:
    """Passes a worker's KV events on, but for a share of the messages that it drops."""

    def __init__(self, endpoint: str, loss: float, seed: int) -> None:
        self._context = zmq.Context()
        self._source = self._context.socket(zmq.SUB)
        self._source.setsockopt(zmq.SUBSCRIBE, b"")
        self._source.connect(endpoint)
        self._sink = self._context.socket(zmq.PUB)
        self.port = self._sink.bind_to_random_port("tcp://127.0.0.1")
        self._loss = loss
        self._random = random.Random(seed)
        self.dropped = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            if not self._source.poll(20):
                continue
            message = self._source.recv_multipart()
            if self._random.random() < self._loss:
                self.dropped += 1
            else:
                self._sink.send_multipart(message)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._context.destroy(linger=0)


def send_prompts(fleet: WorkerFleet, count: int, seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(count):
        tokens = [draw.randrange(1, 1000) for _ in range(draw.randrange(BLOCK, 4 * BLOCK))]
        complete(fleet, draw.randrange(len(fleet.workers)), tokens)


def all_whole(router: KvRouter) -> bool:
    return all(worker["cache_knowledge"] == "whole" for worker in router.status()["workers"])


def same_blocks(a: KvRouter, b: KvRouter) -> bool:
    return all(np.array_equal(a.worker_blocks(w), b.worker_blocks(w)) for w in range(a.num_workers))


def test_late_router_knows_what_an_early_one_knows(fleet):
    with router_for(fleet, replay=True) as early:
        eventually(lambda: all_whole(early))
        send_prompts(fleet, 12, seed=1)
        with router_for(fleet, replay=True) as late:
            eventually(lambda: all_whole(late) and same_blocks(early, late))
            send_prompts(fleet, 4, seed=2)
            eventually(lambda: same_blocks(early, late))
            assert all(len(late.worker_blocks(w)) > 0 for w in range(2))


def test_lost_messages_leave_no_difference(fleet):
    proxies = [LossyProxy(worker.kv_events_endpoint, 0.3, seed) for seed, worker in enumerate(fleet.workers)]
    try:
        with (
            router_for(fleet, replay=True) as undisturbed,
            KvRouter(
                block_size=fleet.block_size,
                num_workers=2,
                base_kv_events_port=fleet.base_kv_events_port,
                base_metrics_port=fleet.base_metrics_port,
                worker_addresses=["127.0.0.1"] * 2,
                worker_ports=[proxy.port for proxy in proxies],
                replay=[worker.replay_endpoint for worker in fleet.workers],
            ) as disturbed,
        ):
            eventually(lambda: all_whole(undisturbed) and all_whole(disturbed))
            send_prompts(fleet, 30, seed=3)
            assert sum(proxy.dropped for proxy in proxies) > 0
            eventually(lambda: all_whole(disturbed) and same_blocks(undisturbed, disturbed))
            assert sum(worker["replayed_batches"] for worker in disturbed.status()["workers"]) > 0
    finally:
        for proxy in proxies:
            proxy.close()
