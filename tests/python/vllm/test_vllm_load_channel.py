"""Load settings from the environment, and the channel over a real ZeroMQ socket."""

from __future__ import annotations

import gc
import json
import logging
import subprocess
import sys
import time

import pytest
import zmq

from kvrouter.vllm.load_channel import LoadChannel, load_settings
from kvrouter.vllm.ports import find_free_ports


@pytest.fixture
def port():
    found = find_free_ports(1)
    found.release()
    return found[0]


@pytest.fixture
def subscriber(port):
    with zmq.Context() as context:
        socket = context.socket(zmq.SUB)
        socket.subscribe(b"")
        socket.connect(f"tcp://127.0.0.1:{port}")
        yield socket
        socket.close(linger=0)


def receive(socket: zmq.Socket, timeout_s: float = 5.0) -> dict:
    assert socket.poll(int(timeout_s * 1000)), "no load message came"
    return json.loads(socket.recv())


def receive_until(socket: zmq.Socket, expected: dict, timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    seen = []
    while time.monotonic() < deadline:
        seen.append(receive(socket))
        if seen[-1] == expected:
            return
    raise AssertionError(f"{expected} did not come, but {seen}")


def state(usage: float, waiting: int, running: int) -> dict:
    return {"kv_cache_usage": usage, "num_waiting_reqs": waiting, "num_running_reqs": running}


@pytest.mark.parametrize(
    ("environ", "rank", "endpoint"),
    [
        ({}, 0, None),
        ({"KVROUTER_LOAD_ENDPOINT": " ", "KVROUTER_BASE_METRICS_PORT": ""}, 0, None),
        ({"KVROUTER_LOAD_ENDPOINT": "tcp://*:5657"}, 0, "tcp://*:5657"),
        ({"KVROUTER_LOAD_ENDPOINT": "tcp://*:5657"}, 3, "tcp://*:5660"),
        ({"KVROUTER_LOAD_ENDPOINT": "tcp://[::1]:5657"}, 1, "tcp://[::1]:5658"),
        ({"KVROUTER_LOAD_ENDPOINT": "ipc:///run/load"}, 1, "ipc:///run/load_dp1"),
        ({"KVROUTER_BASE_METRICS_PORT": "5657"}, 0, "tcp://*:5657"),
        ({"KVROUTER_BASE_METRICS_PORT": "5657", "KVROUTER_WORKER_ID": "2"}, 1, "tcp://*:5660"),
        ({"KVROUTER_LOAD_ENDPOINT": "tcp://h:1", "KVROUTER_BASE_METRICS_PORT": "2"}, 0, "tcp://h:1"),
    ],
)
def test_load_settings_endpoint_of_worker_and_rank(environ, rank, endpoint):
    settings = load_settings(environ, rank)
    assert (settings.endpoint if settings else None) == endpoint


@pytest.mark.parametrize(
    ("environ", "variable"),
    [
        ({"KVROUTER_LOAD_ENDPOINT": "5657"}, "KVROUTER_LOAD_ENDPOINT"),
        ({"KVROUTER_LOAD_ENDPOINT": "tcp://*"}, "KVROUTER_LOAD_ENDPOINT"),
        ({"KVROUTER_LOAD_ENDPOINT": "udp://*:5657"}, "KVROUTER_LOAD_ENDPOINT"),
        ({"KVROUTER_LOAD_ENDPOINT": "tcp://*:0"}, "KVROUTER_LOAD_ENDPOINT"),
        ({"KVROUTER_LOAD_ENDPOINT": "tcp://*:65536"}, "KVROUTER_LOAD_ENDPOINT"),
        ({"KVROUTER_LOAD_ENDPOINT": "tcp://*:5657\n"}, None),
        ({"KVROUTER_LOAD_ENDPOINT": "tcp://a b:5657"}, "KVROUTER_LOAD_ENDPOINT"),
        ({"KVROUTER_BASE_METRICS_PORT": "fifty"}, "KVROUTER_BASE_METRICS_PORT"),
        ({"KVROUTER_BASE_METRICS_PORT": "-5"}, "KVROUTER_BASE_METRICS_PORT"),
        ({"KVROUTER_BASE_METRICS_PORT": "65535", "KVROUTER_WORKER_ID": "1"}, "KVROUTER_BASE_METRICS_PORT"),
        ({"KVROUTER_BASE_METRICS_PORT": "5657", "KVROUTER_WORKER_ID": "x"}, "KVROUTER_WORKER_ID"),
        ({"KVROUTER_WORKER_ID": "1"}, "KVROUTER_BASE_METRICS_PORT is not"),
    ],
)
def test_load_settings_unusable_value_names_the_variable(environ, variable):
    if variable is None:
        assert load_settings(environ) is not None
        return
    with pytest.raises(ValueError, match=variable):
        load_settings(environ)


def test_load_channel_late_subscriber_learns_the_state_from_the_heartbeat(port, subscriber):
    channel = LoadChannel(f"tcp://127.0.0.1:{port}")
    channel.publish(0.25, 3, 7)
    time.sleep(0.3)
    with zmq.Context() as context, context.socket(zmq.SUB) as late:
        late.subscribe(b"")
        late.connect(f"tcp://127.0.0.1:{port}")
        started = time.monotonic()
        assert receive(late) == state(0.25, 3, 7)
        assert time.monotonic() - started < 2.5
    channel.close()


def test_load_channel_idle_channel_sends_about_once_a_second(port, subscriber):
    channel = LoadChannel(f"tcp://127.0.0.1:{port}")
    receive(subscriber)
    started = time.monotonic()
    for _ in range(3):
        receive(subscriber)
    assert 2.0 < time.monotonic() - started < 4.5
    channel.close()


def test_load_channel_change_is_sent_at_once(port, subscriber):
    channel = LoadChannel(f"tcp://127.0.0.1:{port}")
    receive(subscriber)
    delays = []
    for step in range(1, 21):
        started = time.monotonic()
        channel.publish(step / 100, step, step)
        receive_until(subscriber, state(step / 100, step, step))
        delays.append(time.monotonic() - started)
    assert sorted(delays)[len(delays) // 2] < 0.05
    channel.close()


def test_load_channel_newest_of_a_burst_arrives_and_counts_stay_in_bounds(port, subscriber):
    channel = LoadChannel(f"tcp://127.0.0.1:{port}")
    receive(subscriber)
    for step in range(20000):
        channel.publish(step / 20000, step, step)
    channel.publish(1.5, -1, 4)
    receive_until(subscriber, state(1.0, 0, 4))
    channel.publish(float("nan"), 1, 1)
    channel.publish(0.5, 1, 1)
    receive_until(subscriber, state(0.5, 1, 1))
    channel.close()


def test_load_channel_publish_costs_microseconds(port):
    channel = LoadChannel(f"tcp://127.0.0.1:{port}")
    costs = []
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(2000):
            channel.publish(0.5, 1, 1)
        costs.append((time.perf_counter() - started) / 2000)
    channel.close()
    assert min(costs) < 50e-6


def test_load_channel_taken_port_is_warned_about_once_and_taken_up_when_free(port, caplog):
    caplog.set_level(logging.WARNING, "kvrouter")
    with zmq.Context() as context:
        squatter = context.socket(zmq.PUB)
        squatter.bind(f"tcp://127.0.0.1:{port}")
        channel = LoadChannel(f"tcp://127.0.0.1:{port}", "KVROUTER_BASE_METRICS_PORT")
        time.sleep(2.5)
        warnings = [record.getMessage() for record in caplog.records]
        assert len(warnings) == 1
        assert f"port {port} is taken (KVROUTER_BASE_METRICS_PORT gives" in warnings[0]
        squatter.close(linger=0)
        subscriber = context.socket(zmq.SUB)
        subscriber.subscribe(b"")
        subscriber.connect(f"tcp://127.0.0.1:{port}")
        assert receive(subscriber) == state(0.0, 0, 0)
        subscriber.close(linger=0)
    channel.close()


def test_load_channel_closed_or_forgotten_channel_frees_its_port(port):
    for forget in (False, True, False):
        channel = LoadChannel(f"tcp://127.0.0.1:{port}")
        thread = channel._thread
        if not forget:
            channel.close()
            channel.close()
        del channel
        gc.collect()
        thread.join(5.0)
        assert not thread.is_alive()


def test_load_channel_unbindable_endpoint_is_one_warning(caplog):
    caplog.set_level(logging.WARNING, "kvrouter")
    channel = LoadChannel("tcp://no.such.interface.invalid:5657")
    channel._thread.join(10.0)
    assert [record.getMessage() for record in caplog.records if "cannot bind" in record.getMessage()]
    assert len(caplog.records) == 1
    channel.publish(0.1, 1, 1)
    channel.close()


def test_load_channel_open_at_exit_does_not_hold_the_interpreter(port):
    program = (
        "from kvrouter.vllm.load_channel import LoadChannel\n"
        f"channel = LoadChannel('tcp://127.0.0.1:{port}')\n"
        "channel.publish(0.5, 1, 1)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=20, check=False)
    assert (done.returncode, done.stderr) == (0, "")
