"""The self-check on what real vLLM 0.32 workers published: a captured session, sent once more from a socket."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgpack
import pytest
import zmq

from kvrouter import KvRouter, compute_block_hashes

CAPTURE = Path(__file__).parents[1] / "golden" / "vllm-0.32.0.bin"
BLOCK = 64
WINDOW = 64


def captured_batches() -> list[tuple[int, bytes]]:
    """(sequence number, payload) of worker 0, in order; the second worker's has numbers that were there already."""
    data = CAPTURE.read_bytes()
    messages, at = [], 0
    while at < len(data):
        (frames,) = struct.unpack_from("<I", data, at)
        at += 4
        message = []
        for _ in range(frames):
            (length,) = struct.unpack_from("<I", data, at)
            message.append(data[at + 4 : at + 4 + length])
            at += 4 + length
        messages.append(message)
    batches: dict[int, bytes] = {}
    for _, sequence, payload in messages:
        batches.setdefault(int.from_bytes(sequence, "big"), payload)
    return sorted(batches.items())


def events_of(payload: bytes) -> list[dict[str, object]]:
    return msgpack.unpackb(payload)[1]


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.01)


class ReplayedWorker:
    def __init__(self, publisher: zmq.Socket, router: KvRouter) -> None:
        self.publisher, self.router = publisher, router

    def publish(self, batches: list[tuple[int, bytes]]) -> None:
        seen = self.state()["events"]
        for sequence, payload in batches:
            self.publisher.send_multipart([b"kv", sequence.to_bytes(8, "big"), payload])
        wait_for(lambda: self.state()["events"] == seen + len(batches))

    def state(self) -> dict[str, object]:
        return self.router.status()["workers"][0]

    def hits(self) -> dict[str, object]:
        return self.state()["hits"]

    def request(self, prompt: list[int], cached_tokens: int) -> None:
        decision = self.router.route(prompt)
        self.router.report_hit(
            0, decision.overlap_blocks, len(prompt), cached_tokens, hashes=compute_block_hashes(prompt, BLOCK)
        )


@pytest.fixture
def worker() -> Iterator[ReplayedWorker]:
    with zmq.Context() as context, context.socket(zmq.PUB) as publisher:
        publisher.linger = 0
        port = publisher.bind_to_random_port("tcp://127.0.0.1")
        with KvRouter(BLOCK, 1, worker_ports=[port]) as router:
            replayed = ReplayedWorker(publisher, router)
            wait_for(lambda: replayed.state()["state"] == "up")
            yield replayed


def captured_session() -> tuple[list[tuple[int, bytes]], list[tuple[int, bytes]], list[int]]:
    """Batches before the cache was reset, those from the AllBlocksCleared on, and the first prompt."""
    batches = captured_batches()
    cleared = next(
        i for i, (_, payload) in enumerate(batches) if any(e["type"] == "AllBlocksCleared" for e in events_of(payload))
    )
    first = next(e for e in events_of(batches[0][1]) if e["type"] == "BlockStored")
    return batches[:cleared], batches[cleared:], [*first["token_ids"], 1]


def test_capture_agrees_with_its_prompts(worker: ReplayedWorker) -> None:
    before, _, prompt = captured_session()
    worker.publish(before)
    for _ in range(WINDOW):
        worker.request(prompt, len(prompt) // BLOCK * BLOCK)
    assert worker.hits()["reports"] == WINDOW
    assert worker.hits()["missing_tokens"] == worker.hits()["surplus_tokens"] == 0
    assert worker.hits()["cause"] == ""


def test_reset_that_is_told_late_is_named(worker: ReplayedWorker) -> None:
    before, after, prompt = captured_session()
    worker.publish(before)
    for _ in range(WINDOW - 1):  # the cache is empty already, and vLLM says so with its next batch
        worker.request(prompt, 0)
    worker.publish(after)
    worker.request(prompt, len(prompt) // BLOCK * BLOCK)
    assert worker.hits()["cause"] == "cleared_late"
    for _ in range(WINDOW):
        worker.request(prompt, len(prompt) // BLOCK * BLOCK)
    assert worker.hits()["cause"] == ""
    assert worker.hits()["episodes"] == 1


def test_lost_event_is_named(worker: ReplayedWorker) -> None:
    before, after, prompt = captured_session()
    worker.publish(before[:1])
    worker.publish([(sequence + 100, payload) for sequence, payload in before[-1:]])  # what lay between is lost
    assert after
    for _ in range(WINDOW):
        worker.request(prompt, len(prompt) // BLOCK * BLOCK)
    assert worker.hits()["cause"] == "lost_events"


def test_other_block_size_is_named() -> None:
    before, _, prompt = captured_session()
    with zmq.Context() as context, context.socket(zmq.PUB) as publisher:
        publisher.linger = 0
        port = publisher.bind_to_random_port("tcp://127.0.0.1")
        with KvRouter(32, 1, worker_ports=[port]) as router:
            replayed = ReplayedWorker(publisher, router)
            wait_for(lambda: replayed.state()["state"] == "up")
            replayed.publish(before)
            for _ in range(WINDOW):
                router.report_hit(0, router.route(prompt).overlap_blocks, len(prompt), len(prompt) - 1)
            assert replayed.hits()["cause"] == "block_size"


def test_numbers_out_of_range_are_refused() -> None:
    router = KvRouter(BLOCK, 1)
    for arguments in [(1, 0, 10, 0), (0, -1, 10, 0), (0, 0, 0, 0), (0, 0, 10, -1)]:
        with pytest.raises(ValueError):
            router.report_hit(*arguments)


def test_index_memory_limit_is_checked_and_kept() -> None:
    with pytest.raises(ValueError, match="index_memory_limit"):
        KvRouter(BLOCK, 1, index_memory_limit=1000)
    with pytest.raises(ValueError, match="index_memory_limit"):
        KvRouter(BLOCK, 1, index_memory_limit=-1)
    config = {"enabled": True, "block_size": BLOCK, "base_kv_events_port": 5557, "base_metrics_port": 5657}
    router = KvRouter.from_config(config | {"index_memory_limit": 1 << 20}, 1)
    index = router._core.index
    for first in range(1, 200_001, 100):
        hashes = list(range(first, first + 100))
        index.store(0, None, hashes, hashes)
    state = router.status()["index"]
    assert 0 < state["memory_bytes"] <= 1 << 20
    assert state["given_up_blocks"] + state["blocks"] == 200_000
