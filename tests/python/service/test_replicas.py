"""Replicas of the service: what one sends where counts for the other; a lost one takes only that along."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from chaos.fleet import free_ports
from conftest import BLOCK_SIZE, Client, served, spec_of, wait_for
from kvrouter import KvRouter
from kvrouter.sim import SimWorker


def endpoints(count: int = 2) -> list[str]:
    return [f"tcp://127.0.0.1:{port}" for port in free_ports(count)]


def replicas_of(client: Client) -> dict[str, int]:
    return client.json("GET", "/workers")["replicas"]


def ask_for_a_worker(client: Client, first: int) -> dict[str, object]:
    """A decision of the service's, whose request nobody sends."""
    return client.json("POST", "/route", {"tokens": [first] * (4 * BLOCK_SIZE)})


@contextlib.contextmanager
def serve_process(
    workers: list[SimWorker], log: Path, *options: str
) -> Iterator[tuple[subprocess.Popen[bytes], Client]]:
    """``kvrouter serve`` in a process of its own."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "kvrouter.cli", "serve", f"--port={port}", f"--block-size={BLOCK_SIZE}", *options]
    for worker in workers:
        spec = spec_of(worker)
        command.append(f"--worker={spec.url},kv_events={spec.kv_events},load={spec.load}")
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        client = Client(f"http://127.0.0.1:{port}")

        def ready() -> bool:
            assert process.poll() is None, log.read_text()
            with contextlib.suppress(OSError):
                return client.ask("GET", "/ready")[0] == 200
            return False

        wait_for(ready, 60)
        yield process, client
    finally:
        process.kill()
        process.wait()


def test_two_services_know_of_each_other_and_a_killed_one_costs_its_requests_only(
    two_workers: list[SimWorker], tmp_path: Path
):
    here, there = endpoints()
    options = ["--policy=adaptive", f"--replica-bind={there}", f"--replica-peer={here}", f"--replica-peer={there}"]
    specs = [spec_of(worker) for worker in reversed(two_workers)]
    with (
        served(specs, policy="adaptive", replica_bind=here, replica_peers=[there], replica_timeout_s=1.0) as client,
        serve_process(two_workers, tmp_path / "serve.log", *options) as (process, other),
    ):
        wait_for(lambda: replicas_of(client)["live"] == 1 and replicas_of(other)["live"] == 1)
        assert replicas_of(other)["peers"] == 1  # it does not count itself
        sent = [ask_for_a_worker(other, 10 + number)["url"] for number in range(8)]
        wait_for(lambda: replicas_of(client)["requests"] == 8)
        # Its decisions are balanced with those of the other, whose workers have other numbers.
        sent += [ask_for_a_worker(client, 50 + number)["url"] for number in range(8)]
        assert sorted(sent.count(url) for url in set(sent)) == [8, 8]
        wait_for(lambda: replicas_of(other)["requests"] == 8)
        assert client.metrics()["kvrouter_replica_requests"] == 8

        os.kill(process.pid, signal.SIGKILL)
        wait_for(lambda: replicas_of(client)["losses"] == 1)
        assert replicas_of(client)["requests"] == 0
        assert client.json("GET", "/workers")["account"]["requests"] == 8  # its own
        assert client.ask("POST", "/v1/completions", {"model": "sim", "prompt": [3] * 40, "max_tokens": 1})[0] == 200


def test_requests_through_either_gateway_end_in_both_accounts(two_workers: list[SimWorker]):
    here, there = endpoints()
    specs = [spec_of(worker) for worker in two_workers]
    with (
        served(specs, policy="adaptive", replica_bind=here, replica_peers=[here, there]) as first,
        served(specs, policy="adaptive", replica_bind=there, replica_peers=[here, there]) as second,
    ):
        wait_for(lambda: replicas_of(first)["live"] == 1 and replicas_of(second)["live"] == 1)
        for number in range(20):
            client = (first, second)[number % 2]
            body = {"model": "sim", "prompt": [number + 3] * 40, "max_tokens": 4, "stream": number % 3 == 0}
            assert client.ask("POST", "/v1/completions", body)[0] == 200
        for client in (first, second):
            wait_for(lambda client=client: client.json("GET", "/workers")["account"]["requests"] == 0)
            assert replicas_of(client)["received"] > 0
            assert replicas_of(client)["missed"] == replicas_of(client)["malformed"] == 0


def test_routers_in_processes_of_users_are_replicas_too(two_workers: list[SimWorker]):
    here, there = endpoints()
    ports = [[int(e.rpartition(":")[2]) for e in (w.kv_events_endpoint, w.load_endpoint)] for w in two_workers[:1]]
    common = {
        "block_size": BLOCK_SIZE,
        "num_workers": 1,
        "base_kv_events_port": ports[0][0],
        "base_metrics_port": ports[0][1],
        "policy": "adaptive",
    }
    with (
        KvRouter(**common, replica_bind=here, replica_peers=[there]) as first,
        KvRouter(**common, replica_bind=there, replica_peers=[here]) as second,
    ):
        wait_for(lambda: first.status()["replicas"]["live"] == second.status()["replicas"]["live"] == 1)
        decision = first.route([5] * 64)
        wait_for(lambda: second.status()["account"]["requests"] == 1)
        first.complete(decision.ticket)
        wait_for(lambda: second.status()["account"]["requests"] == 0)


def test_settings_out_of_range_are_named():
    with pytest.raises(ValueError, match="replica_timeout"):
        KvRouter(num_workers=1, replica_bind="tcp://127.0.0.1:1", replica_timeout_s=0.1)
    router = KvRouter(num_workers=1, replica_peers=["nonsense"])
    with pytest.raises(RuntimeError, match="replica_peers 'nonsense'"):
        router.start()
