"""What real vLLM workers, started by the launcher, say to a router."""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
import urllib.request
from urllib.parse import urlsplit

import pytest
import zmq

from process_state import runs

pytestmark = pytest.mark.vllm

BLOCK = 64


def prompt(num_tokens: int) -> list[int]:
    """Tokens that no other test has sent."""
    generator = random.Random(os.urandom(16))
    return [generator.randrange(3, 1024) for _ in range(num_tokens)]


def complete(fleet, index: int, tokens: list[int], max_tokens: int = 2) -> dict:
    body = {"model": fleet.model, "prompt": tokens, "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0}
    request = urllib.request.Request(
        f"{fleet.workers[index].url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)["usage"]


def cached(usage: dict) -> int:
    return (usage["prompt_tokens_details"] or {}).get("cached_tokens") or 0


@pytest.fixture
def subscribe():
    context = zmq.Context()
    context.linger = 0
    sockets = []

    def make(endpoint: str) -> zmq.Socket:
        socket = context.socket(zmq.SUB)
        socket.subscribe(b"")
        socket.connect(endpoint)
        sockets.append(socket)
        return socket

    yield make
    for socket in sockets:
        socket.close(linger=0)
    context.term()


def replayed_sequences(endpoint: str) -> list[int]:
    """The sequence numbers of all batches that the worker has kept."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.connect(endpoint)
        dealer.send_multipart([b"", (0).to_bytes(8, "big")])
        numbers = []
        while True:
            assert dealer.poll(10000), f"replay stopped after {numbers}"
            sequence = dealer.recv_multipart()[2]
            if sequence == b"\xff" * 8:
                return numbers
            numbers.append(int.from_bytes(sequence, "big"))


def newest_load(socket: zmq.Socket, wanted, timeout_s: float = 15.0) -> dict:
    deadline = time.monotonic() + timeout_s
    seen = []
    while time.monotonic() < deadline:
        if socket.poll(1000):
            seen.append(json.loads(socket.recv()))
            if wanted(seen[-1]):
                return seen[-1]
    raise AssertionError(f"the load that was waited for did not come: {seen[-20:]}")


def test_worker_side_kv_events_come_in_order_from_sequence_zero(vllm_fleet, subscribe):
    worker = vllm_fleet.workers[0]
    events = subscribe(worker.kv_events_endpoint)
    time.sleep(1.0)
    for _ in range(3):
        complete(vllm_fleet, 0, prompt(3 * BLOCK))
    numbers = []
    while len(numbers) < 3:
        assert events.poll(10000), f"only {numbers}"
        topic, sequence, payload = events.recv_multipart()
        assert topic == b"kv"
        assert b"BlockStored" in payload
        numbers.append(int.from_bytes(sequence, "big"))
    assert numbers == list(range(numbers[0], numbers[0] + 3))
    assert replayed_sequences(worker.replay_endpoint) == list(range(numbers[-1] + 1))


def test_worker_side_usage_tells_the_cached_tokens_and_reset_forgets_them(vllm_fleet):
    tokens = prompt(10 * BLOCK + 7)
    usages = [complete(vllm_fleet, 0, tokens) for _ in range(2)]
    assert [usage["prompt_tokens"] for usage in usages] == [len(tokens)] * 2
    assert [cached(usage) for usage in usages] == [0, 10 * BLOCK]
    assert cached(complete(vllm_fleet, 1, tokens)) == 0
    vllm_fleet.reset_prefix_caches()
    assert [cached(complete(vllm_fleet, index, tokens)) for index in (0, 1)] == [0, 0]


def test_worker_side_reset_waits_for_running_requests_and_says_when_it_cannot(vllm_fleet):
    from kvrouter.vllm import LaunchError

    parts = urlsplit(vllm_fleet.workers[0].url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)
    body = {"model": vllm_fleet.model, "prompt": prompt(64), "max_tokens": 7000, "ignore_eos": True, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    connection.getresponse().readline()
    with pytest.raises(LaunchError, match="worker 0 did not reset its prefix cache: it still has requests"):
        vllm_fleet.reset_prefix_caches(timeout=0.5)
    threading.Timer(1.0, connection.close).start()
    vllm_fleet.reset_prefix_caches(timeout=20.0)


def test_worker_side_load_follows_the_requests(vllm_fleet, subscribe):
    load = subscribe(vllm_fleet.workers[1].load_endpoint)
    idle = newest_load(load, lambda message: True, 3.0)
    assert idle == {"kv_cache_usage": 0.0, "num_waiting_reqs": 0, "num_running_reqs": 0}
    complete(vllm_fleet, 1, prompt(4 * BLOCK), max_tokens=50)
    busy = newest_load(load, lambda message: message["num_running_reqs"] == 1)
    assert 0.0 < busy["kv_cache_usage"] < 0.1
    newest_load(load, lambda message: message == idle)


def test_worker_side_load_falls_back_when_a_client_goes_away(vllm_fleet, subscribe):
    load = subscribe(vllm_fleet.workers[1].load_endpoint)
    parts = urlsplit(vllm_fleet.workers[1].url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)
    body = {"model": vllm_fleet.model, "prompt": prompt(64), "max_tokens": 7000, "ignore_eos": True, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    connection.getresponse().readline()
    newest_load(load, lambda message: message["num_running_reqs"] == 1)
    connection.close()
    newest_load(load, lambda message: message["num_running_reqs"] == 0 and message["kv_cache_usage"] == 0.0)


def test_worker_side_load_agrees_with_the_metrics_page(vllm_fleet, subscribe):
    load = subscribe(vllm_fleet.workers[0].load_endpoint)
    message = newest_load(load, lambda message: True)
    with urllib.request.urlopen(f"{vllm_fleet.workers[0].url}/metrics", timeout=10) as response:
        lines = [line for line in response.read().decode().splitlines() if not line.startswith("#")]
    values = {line.split("{")[0]: float(line.split()[-1]) for line in lines if "{" in line}
    assert values["vllm:kv_cache_usage_perc"] == message["kv_cache_usage"]
    assert values["vllm:num_requests_waiting"] == message["num_waiting_reqs"]
    assert values["vllm:num_requests_running"] == message["num_running_reqs"]


def test_worker_side_killed_worker_leaves_no_process_and_restarts_on_its_ports(vllm_fleet, processes_under, subscribe):
    before = vllm_fleet.workers[1]
    processes = processes_under(before.pid)
    assert len(processes) >= 3
    vllm_fleet.kill(1)
    assert not vllm_fleet.is_alive(1)
    assert vllm_fleet.is_alive(0)
    assert [pid for pid in processes if runs(pid)] == []
    vllm_fleet.restart(1)
    after = vllm_fleet.workers[1]
    assert after.pid != before.pid
    assert (after.url, after.kv_events_endpoint, after.load_endpoint) == (
        before.url,
        before.kv_events_endpoint,
        before.load_endpoint,
    )
    newest_load(subscribe(after.load_endpoint), lambda message: message["num_running_reqs"] == 0, 5.0)
    assert cached(complete(vllm_fleet, 1, prompt(2 * BLOCK))) == 0
    assert replayed_sequences(after.replay_endpoint)[0] == 0


def test_worker_side_launcher_killed_while_starting_leaves_no_process(tiny_model, tmp_path, processes_under):
    program = textwrap.dedent(
        """
        import sys
        from kvrouter.vllm import launch_workers, make_tiny_model
        launch_workers(1, model=make_tiny_model(sys.argv[1], num_layers=2), log_dir=sys.argv[2], progress=False)
        """
    )
    launcher = subprocess.Popen([sys.executable, "-c", program, str(tiny_model.path), str(tmp_path)])
    try:
        deadline = time.monotonic() + 120
        # Launcher, guard, server, resource tracker and engine at least.
        while len(processes := processes_under(launcher.pid)) < 5:
            assert launcher.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        launcher.send_signal(signal.SIGKILL)
        launcher.wait()
    deadline = time.monotonic() + 15
    while any(map(runs, processes)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [pid for pid in processes if runs(pid)] == []


def test_worker_side_worker_that_cannot_start_is_explained(tiny_model, tmp_path):
    from kvrouter.vllm import LaunchError, launch_workers

    with pytest.raises(LaunchError, match=r"(?s)worker 0 ended with exit code 2.*extra_args.*--no-such-flag"):
        launch_workers(1, model=tiny_model, extra_args=["--no-such-flag"], log_dir=tmp_path, progress=False)


def test_worker_side_kv_events_config_is_what_vllm_takes():
    from vllm.config.kv_events import KVEventsConfig

    from kvrouter.vllm import kv_events_config

    config = KVEventsConfig(**kv_events_config(1))
    assert (config.endpoint, config.replay_endpoint) == ("tcp://*:5558", "tcp://*:5758")
    assert config.publisher == "zmq"
