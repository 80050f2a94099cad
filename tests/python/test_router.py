"""KvRouter as its users see it: settings, decisions, life, log lines."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import zmq

import kvrouter
from kvrouter import KvRouter, RouterConfig

KV_BATCH_TOKENS = list(range(100, 100 + 128))


def eventually(condition, timeout_s=10.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not come to hold"
        time.sleep(0.005)


class Publishers:
    """The KV-event and load publishers of some workers, on free ports."""

    def __init__(self, num_workers):
        self.context = zmq.Context()
        self.kv = [self.context.socket(zmq.PUB) for _ in range(num_workers)]
        self.kv_ports = [socket.bind_to_random_port("tcp://127.0.0.1") for socket in self.kv]

    def publish_stored(self, worker, sequence, tokens, block_size=64):
        import msgpack

        count = len(tokens) // block_size
        event = {
            "type": "BlockStored",
            "block_hashes": [hash((worker, *tokens[: (i + 1) * block_size])) & (2**64 - 1) for i in range(count)],
            "parent_block_hash": None,
            "token_ids": tokens[: count * block_size],
            "block_size": block_size,
            "lora_id": None,
        }
        payload = msgpack.packb([0.0, [event], 0])
        self.kv[worker].send_multipart([b"kv", sequence.to_bytes(8, "big"), payload])

    def close(self):
        self.context.destroy(linger=0)


@pytest.fixture
def publishers():
    made = Publishers(2)
    yield made
    made.close()


# --- settings ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_workers": 0}, "num_workers must be at least 1"),
        ({"num_workers": -3}, "num_workers must be at least 1"),
        ({"block_size": 0}, "block_size must be at least 1"),
        ({"base_kv_events_port": 0}, "base_kv_events_port: port 0 is out of range"),
        ({"base_metrics_port": 70000}, "base_metrics_port: port 70000 is out of range"),
        ({"base_kv_events_port": 65534}, r"base_kv_events_port \+ 2: port 65536 is out of range"),
        ({"num_workers": 101}, "set base_kv_events_port and base_metrics_port at least num_workers"),
        ({"worker_addresses": ["a"]}, r"Number of worker addresses \(1\) must match number of workers \(4\)"),
        ({"worker_ports": [1, 2]}, r"Number of worker ports \(2\) must match number of workers \(4\)"),
        ({"worker_ports": [5000, 5000, 5001, 5002]}, "port 5000 of localhost would carry"),
        ({"worker_ports": [5000, 5100, 5001, 5002]}, "port 5100 of localhost would carry"),
        ({"worker_urls": ["http://a:1"]}, r"worker_urls \(1\)"),
        ({"num_workers": 1, "worker_urls": ["a:1"]}, "worker_urls: 'a:1' is not of the form http://host:port"),
        ({"policy": "best"}, "policy 'best' is unknown; there are: adaptive, cache_aware"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        KvRouter(**settings)


def test_worker_endpoints():
    router = KvRouter(num_workers=2)
    assert [w.kv_events_endpoint for w in router.workers] == ["tcp://localhost:5557", "tcp://localhost:5558"]
    assert [w.load_endpoint for w in router.workers] == ["tcp://localhost:5657", "tcp://localhost:5658"]
    router = KvRouter(num_workers=2, worker_addresses=["10.0.0.1", "::1"], worker_ports=[7000, 8000])
    assert [w.kv_events_endpoint for w in router.workers] == ["tcp://10.0.0.1:7000", "tcp://[::1]:8000"]
    assert [w.metrics_port for w in router.workers] == [7100, 8100]


def test_replay_endpoints():
    def endpoints(router):
        return [worker["replay_endpoint"] for worker in router.status()["workers"]]

    assert endpoints(KvRouter(num_workers=2)) == ["", ""]
    assert endpoints(KvRouter(num_workers=2, replay=True)) == ["tcp://localhost:5757", "tcp://localhost:5758"]
    assert endpoints(KvRouter(num_workers=2, replay=["tcp://a:1", None])) == ["tcp://a:1", ""]
    with pytest.raises(ValueError, match="replay endpoints"):
        KvRouter(num_workers=2, replay=["tcp://a:1"])


def test_worker_blocks_are_the_workers_names_in_order():
    router = KvRouter(num_workers=2, block_size=4)
    router._core.index.store(1, None, [10, 20, 30], [7, 5, 6])
    assert router.worker_blocks(0).tolist() == []
    assert router.worker_blocks(1).tolist() == [5, 6, 7]
    router._core.index.remove(1, [5])
    assert router.worker_blocks(1).tolist() == [6, 7]


def test_from_config():
    config: RouterConfig = {
        "enabled": True,
        "block_size": 32,
        "base_kv_events_port": 6000,
        "base_metrics_port": 6100,
        "mode": "round_robin",
    }
    router = KvRouter.from_config(config, num_workers=3)
    assert router.policy == "round_robin"
    assert router.block_size == 32
    assert [router.best_worker([], 1) for _ in range(6)] == [0, 1, 2, 0, 1, 2]
    config["mode"] = "fastest"  # type: ignore[typeddict-item]
    with pytest.raises(ValueError, match="mode"):
        KvRouter.from_config(config, num_workers=3)


# --- decisions ---


@pytest.mark.parametrize("num_tokens", [0, -1])
def test_num_tokens_must_be_positive(num_tokens):
    router = KvRouter(num_workers=2)
    with pytest.raises(ValueError, match="num_tokens must be positive"):
        router.best_worker([1], num_tokens)
    with pytest.raises(ValueError, match="num_tokens must be positive"):
        asyncio.run(router.get_best_worker([1], num_tokens))
    with pytest.raises(ValueError, match="num_tokens must be positive"):
        router.route([])
    assert router.status()["decisions"] == 0


def test_either_tokens_or_hashes():
    router = KvRouter(num_workers=2)
    for arguments in ({}, {"hashes": [1]}, {"num_tokens": 1}, {"tokens": [1], "hashes": [1], "num_tokens": 1}):
        with pytest.raises(ValueError, match="give either tokens, or hashes and num_tokens"):
            router.best_worker(**arguments)


def test_decision_shows_every_worker():
    router = KvRouter(num_workers=3, seed=1)
    tokens = np.arange(256, dtype=np.int32)
    local = kvrouter.compute_block_hashes(tokens)
    router._core.index.store(1, None, local[:2], [11, 12])
    router._core.update_load(2, 0.5, 4)
    decision = router.route(tokens)
    assert decision.worker == 1
    assert decision.overlap_blocks == 2
    assert (decision.num_blocks, decision.num_tokens) == (4, 256)
    assert decision.scores.tolist() == [0.0, 1.0, -1.5]
    assert decision.overlaps.tolist() == [0, 2, 0]
    assert decision.kv_usages.tolist() == [0.0, 0.0, 0.5]
    assert decision.waitings.tolist() == [0, 0, 4]
    assert "worker=1" in repr(decision)
    assert router.best_worker(tokens=tokens.tolist()) == 1
    assert router.best_worker(local, 256) == 1
    assert router.best_worker(local.tolist(), 256) == 1
    router.reset()
    assert router.route(tokens).overlap_blocks == 0


def test_lora_requests_share_nothing_with_others():
    router = KvRouter(num_workers=2)
    tokens = list(range(64))
    router._core.index.store(1, None, kvrouter.compute_block_hashes(tokens, lora_name="a"), [1])
    assert router.route(tokens).overlaps.tolist() == [0, 0]
    assert router.route(tokens, lora_name="a").overlaps.tolist() == [0, 1]


def test_round_robin():
    router = KvRouter(num_workers=3)
    assert [router.worker_round_robin() for _ in range(4)] == [0, 1, 2, 0]
    assert asyncio.run(router.get_worker_round_robin([], 0)) == 1


def test_the_same_seed_gives_the_same_choices():
    choices = [[KvRouter(num_workers=8, seed=seed).best_worker([], 1) for seed in range(20)] for _ in range(2)]
    assert choices[0] == choices[1]
    assert len(set(choices[0])) > 1


# --- life ---


def test_hears_its_workers(publishers):
    with KvRouter(num_workers=2, worker_addresses=["127.0.0.1"] * 2, worker_ports=publishers.kv_ports) as router:
        sequence = iter(range(10**6))

        def heard():
            publishers.publish_stored(1, next(sequence), KV_BATCH_TOKENS)
            time.sleep(0.01)
            return router.status()["workers"][1]["cached_blocks"] == 2

        eventually(heard)
        decision = router.route(KV_BATCH_TOKENS)
        assert (decision.worker, decision.overlap_blocks) == (1, 2)


def test_a_large_fleet_can_be_listened_to():
    with KvRouter(num_workers=200, base_kv_events_port=20000, base_metrics_port=21000) as router:
        assert router.running
        assert len(router.status()["workers"]) == 200


def test_start_and_close_twice_and_again():
    router = KvRouter(num_workers=1)
    for _ in range(2):
        router.start()
        router.start()
        assert router.running
        router.close()
        router.close()
        assert not router.running
    assert router.best_worker([], 1) == 0


def test_async_life_outlives_its_loop():
    router = KvRouter(num_workers=1)
    asyncio.run(router.start_background_tasks())
    asyncio.run(router.start_background_tasks(enable_kv_indexer=False))
    assert router.running
    assert asyncio.run(router.get_best_worker([], 1)) == 0
    asyncio.run(router.shutdown())
    asyncio.run(router.shutdown())
    assert not router.running

    async def as_context():
        async with KvRouter(num_workers=1) as inner:
            assert inner.running
        assert not inner.running

    asyncio.run(as_context())


def test_no_thread_is_left_behind():
    before = threading.active_count()
    router = KvRouter(num_workers=2)
    router.start()
    router.close()
    assert threading.active_count() == before
    dropped = KvRouter(num_workers=2)
    dropped.start()
    core = dropped._core
    del dropped
    gc.collect()
    assert not core.running


# --- log ---


def test_silent_workers_are_warned_of_once(caplog):
    with (
        caplog.at_level(logging.WARNING, "kvrouter"),
        KvRouter(num_workers=2, base_kv_events_port=1, base_metrics_port=101, startup_grace_s=0.1),
    ):
        eventually(lambda: len(caplog.records) >= 2)
        time.sleep(0.3)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert all("cannot be reached" in message and "base_kv_events_port" in message for message in messages)


EXPECTED_LINES = [
    "worker_id: 0, logit = 2 * 0.000 - 0.300 - 0.500 = -0.800",
    "worker_id: 1, logit = 2 * 0.500 - 0.000 - 1.000 = 0.000  <-- Selected",
]


def loaded_router():
    router = KvRouter(num_workers=2)
    tokens = list(range(128))
    router._core.index.store(1, None, kvrouter.compute_block_hashes(tokens)[:1], [1])
    router._core.update_load(0, 0.3, 1)
    router._core.update_load(1, 0.0, 2)
    return router, tokens


class Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


@pytest.mark.parametrize("name", ["kvrouter", "nemo_rl.models.generation.dynamo"])
def test_debug_lines_of_a_decision(name, caplog):
    router, tokens = loaded_router()
    with caplog.at_level(logging.DEBUG, name):
        router.route(tokens)
    assert [r.getMessage() for r in caplog.records] == EXPECTED_LINES
    assert {r.name for r in caplog.records} == {name}


def test_debug_lines_through_every_way_of_asking(caplog):
    with caplog.at_level(logging.DEBUG, "kvrouter"):
        for ask in (
            lambda r, t: r.best_worker(tokens=t),
            lambda r, t: r.best_worker(kvrouter.compute_block_hashes(t), len(t)),
            lambda r, t: asyncio.run(r.get_best_worker(kvrouter.compute_block_hashes(t), len(t))),
        ):
            caplog.clear()
            ask(*loaded_router())
            lines = [r.getMessage() for r in caplog.records if r.name == "kvrouter"]
            assert lines == EXPECTED_LINES


def test_debug_lines_come_once_to_each_handler():
    router, tokens = loaded_router()
    root, compatible = logging.getLogger(), logging.getLogger("nemo_rl.models.generation.dynamo")
    at_root, at_name = Lines(), Lines()
    level = root.level
    root.addHandler(at_root)
    compatible.addHandler(at_name)
    root.setLevel(logging.DEBUG)
    try:
        router.route(tokens)
    finally:
        root.setLevel(level)
        root.removeHandler(at_root)
        compatible.removeHandler(at_name)
    assert at_root.lines == EXPECTED_LINES
    assert at_name.lines == EXPECTED_LINES


def test_status_is_plain_data():
    status = KvRouter(num_workers=2).status()
    assert json.loads(json.dumps(status)) == status
    assert [worker["state"] for worker in status["workers"]] == ["connecting", "connecting"]


def test_interpreter_exit_with_a_running_router_is_clean():
    program = "from kvrouter import KvRouter; router = KvRouter(num_workers=2); router.start(); print('started')"
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stdout) == (0, "started\n"), done.stderr
