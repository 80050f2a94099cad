"""Snapshots: a service that starts anew, or joins another, knows what was known before, if the workers confirm it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from conftest import BLOCK_SIZE, Client, served, sim_worker, spec_of, wait_for
from kvrouter.sim import SimWorker
from kvrouter.worker_spec import WorkerSpec

#: Batches that a worker keeps for replays: far fewer than it publishes here.
BUFFER = 8


def replaying_worker(**options: object) -> SimWorker:
    defaults = {"debug": True, "num_blocks": 513, "replay_endpoint": "tcp://127.0.0.1:*", "replay_buffer": BUFFER}
    return sim_worker(**(defaults | options))


def replaying(worker: SimWorker) -> WorkerSpec:
    spec = spec_of(worker)
    return WorkerSpec(spec.url, spec.kv_events, worker.replay_endpoint, spec.load)


def started_again(spec: WorkerSpec, port: int) -> SimWorker:
    """Another worker at the same addresses, which take the system a moment to free."""
    at = {"kv_events_endpoint": spec.kv_events, "load_endpoint": spec.load, "replay_endpoint": spec.replay}

    def start() -> SimWorker | None:
        try:
            return replaying_worker(port=port, **at)
        except (OSError, RuntimeError):
            return None

    return wait_for(start)


def fill(client: Client, first: int, count: int) -> None:
    for number in range(first, first + count):
        body = {"model": "sim", "prompt": [number] * (3 * BLOCK_SIZE), "max_tokens": 1}
        client.json("POST", "/v1/completions", body)


def believed(client: Client) -> list[int]:
    return client.json("GET", "/workers/0/blocks")["blocks"]


def held(worker: SimWorker) -> list[int]:
    return sorted(Client(f"http://127.0.0.1:{worker.port}").json("GET", "/debug/blocks")["blocks"])


def fill_and_learn(service: Client, worker: SimWorker) -> None:
    """The service hears the worker's events before there are more than the worker keeps."""
    fill(service, 3, 1)
    wait_for(lambda: believed(service) == held(worker))
    fill(service, 4, 59)
    wait_for(lambda: believed(service) == held(worker))


def overlap(client: Client, number: int) -> int:
    return client.json("POST", "/route", {"tokens": [number] * (3 * BLOCK_SIZE)})["overlap_blocks"]


def knowledge(client: Client) -> tuple[int, str]:
    (worker,) = client.workers()
    return worker["warm_starts"], worker["cache_knowledge"]


def test_service_that_starts_anew_knows_what_it_knew(tmp_path: Path):
    snapshot = tmp_path / "index.snapshot"
    with replaying_worker() as worker:
        at_worker = Client(f"http://127.0.0.1:{worker.port}")
        with served([replaying(worker)], snapshot=snapshot) as client:
            fill_and_learn(client, worker)
        assert snapshot.stat().st_size > 100 * 16
        fill(at_worker, 70, 3)  # while no service listens
        with served([replaying(worker)], snapshot=snapshot) as client:
            assert wait_for(lambda: believed(client) == held(worker))
            assert knowledge(client) == (1, "whole")
            assert [overlap(client, number) for number in (3, 62, 72, 99)] == [3, 3, 3, 0]
            assert client.metrics()[f'kvrouter_worker_warm_starts_total{{worker="0",url="{at_worker.url}"}}'] == 1
        with served([replaying(worker)]) as client:  # without it, the worker's buffer is all there is
            wait_for(lambda: knowledge(client) == (0, "partial"))
            assert len(believed(client)) < len(held(worker)) // 2


def test_worker_that_was_restarted_meanwhile_is_not_believed(tmp_path: Path):
    snapshot = tmp_path / "index.snapshot"
    with replaying_worker() as worker:
        spec = replaying(worker)
        with served([spec], snapshot=snapshot) as client:
            fill_and_learn(client, worker)
        port = worker.port
    with started_again(spec, port) as worker:
        fill(Client(f"http://127.0.0.1:{port}"), 200, 70)
        with served([spec], snapshot=snapshot) as client:
            wait_for(lambda: knowledge(client) == (0, "partial"))
            assert set(believed(client)) < set(held(worker))
            assert overlap(client, 3) == 0


def test_replica_that_joins_takes_what_another_knows(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with replaying_worker() as worker, served([replaying(worker)], admin_token="secret") as first:
        fill_and_learn(first, worker)
        options = {"admin_token": "secret", "snapshot_from": first.url}
        with served([replaying(worker)], **options) as second:
            assert wait_for(lambda: believed(second) == held(worker))
            assert knowledge(second) == (1, "whole")
        with (
            caplog.at_level(logging.WARNING, "kvrouter"),
            served([replaying(worker)], admin_token="other", snapshot_from=first.url) as third,
        ):
            wait_for(lambda: knowledge(third) == (0, "partial"))
        assert "/snapshot is not used" in caplog.text


def test_snapshots_are_written_when_asked_for(tmp_path: Path):
    snapshot = tmp_path / "index.snapshot"
    with replaying_worker() as worker:
        with served([replaying(worker)], snapshot=snapshot, admin_token="secret", api_token="api") as client:
            assert not snapshot.exists()
            written = client.json("POST", "/snapshot")
            assert snapshot.stat().st_size == written["bytes"]
            assert client.ask("GET", "/snapshot")[2] == snapshot.read_bytes()
            assert Client(client.url, "api").ask("GET", "/snapshot")[0] == 403
            assert Client(client.url).ask("POST", "/snapshot")[0] == 401
            assert client.ask("DELETE", "/snapshot")[0] == 405
        with served([replaying(worker)]) as client:
            status, _, answer = client.ask("POST", "/snapshot")
            assert status == 409 and b"--snapshot" in answer


@pytest.mark.parametrize("content", [b"", b"KVRSNAP\n", b"\x00" * 4096, b"KVRSNAP\n\x01\x00\x00\x00" + b"\xff" * 64])
def test_what_is_no_snapshot_costs_a_line_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes):
    snapshot = tmp_path / "index.snapshot"
    snapshot.write_bytes(content)
    with caplog.at_level(logging.WARNING, "kvrouter"), replaying_worker(replay_buffer=10_000) as worker:
        fill(Client(f"http://127.0.0.1:{worker.port}"), 3, 5)
        with served([replaying(worker)], snapshot=snapshot) as client:
            assert wait_for(lambda: believed(client) == held(worker))  # all by replay
    assert f"{snapshot} is not used" in caplog.text
    assert snapshot.read_bytes().startswith(b"KVRSNAP\n\x01")  # and it has been replaced at the end
