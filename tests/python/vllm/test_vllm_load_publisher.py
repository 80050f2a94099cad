"""LoadPublisher over a real socket; vLLM's interface is stood in for, so that no vLLM is needed."""

from __future__ import annotations

import abc
import json
import logging
import socket
import subprocess
import sys
import types
from functools import partial

import pytest
import zmq

from kvrouter.vllm.ports import find_free_ports

VARIABLES = ("KVROUTER_LOAD_ENDPOINT", "KVROUTER_BASE_METRICS_PORT", "KVROUTER_WORKER_ID")


class StatLoggerBase(abc.ABC):
    """The part of vLLM's class that a plugin has to fill in."""

    @abc.abstractmethod
    def __init__(self, vllm_config, engine_index=0): ...

    @abc.abstractmethod
    def record(self, scheduler_stats, iteration_stats, mm_cache_stats=None, engine_idx=0): ...

    @abc.abstractmethod
    def log_engine_initialized(self): ...


class Stats:
    """vLLM's scheduler statistics, as far as they are read."""

    def __init__(self, usage: float, waiting: int, running: int, **more: int) -> None:
        self.kv_cache_usage = usage
        self.num_waiting_reqs = waiting
        self.num_running_reqs = running
        self.__dict__.update(more)


@pytest.fixture
def publisher_class(monkeypatch):
    for name in ("vllm", "vllm.v1", "vllm.v1.metrics", "vllm.v1.metrics.loggers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["vllm.v1.metrics.loggers"].StatLoggerBase = StatLoggerBase
    monkeypatch.delitem(sys.modules, "kvrouter.vllm.load_publisher", raising=False)
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    from kvrouter.vllm.load_publisher import LoadPublisher

    yield LoadPublisher
    sys.modules.pop("kvrouter.vllm.load_publisher", None)


@pytest.fixture
def port():
    found = find_free_ports(4)
    found.release()
    return found[0]


@pytest.fixture
def messages():
    context = zmq.Context()
    sockets = []

    def expect(port: int, expected: tuple[float, int, int]) -> None:
        subscriber = context.socket(zmq.SUB)
        subscriber.subscribe(b"")
        subscriber.connect(f"tcp://127.0.0.1:{port}")
        sockets.append(subscriber)
        for _ in range(10):
            assert subscriber.poll(5000), "no load message came"
            message = json.loads(subscriber.recv())
            if tuple(message[key] for key in ("kv_cache_usage", "num_waiting_reqs", "num_running_reqs")) == expected:
                return
        raise AssertionError(f"{expected} did not come; the last is {message}")

    yield expect
    for subscriber in sockets:
        subscriber.close(linger=0)
    context.term()


def test_load_publisher_unasked_is_silent_and_opens_nothing(publisher_class, caplog):
    caplog.set_level(logging.INFO)
    publisher = publisher_class(None, 0)
    publisher.record(Stats(0.5, 1, 2), None)
    assert publisher.endpoint is None
    assert caplog.records == []
    publisher.close()


@pytest.mark.parametrize("rank", [0, 2])
def test_load_publisher_port_is_base_plus_worker_plus_rank(publisher_class, monkeypatch, port, messages, rank):
    monkeypatch.setenv("KVROUTER_BASE_METRICS_PORT", str(port))
    monkeypatch.setenv("KVROUTER_WORKER_ID", "1")
    publisher = publisher_class(None, rank)
    publisher.record(Stats(0.25, 3, 5), None, mm_cache_stats=None, engine_idx=rank)
    messages(port + 1 + rank, (0.25, 3, 5))
    publisher.close()


def test_load_publisher_waiting_counts_deferred_requests_too(publisher_class, port, messages):
    publisher = partial(publisher_class, endpoint=f"tcp://127.0.0.1:{port}")(None, 0)
    publisher.record(Stats(0.0, 3, 5, num_skipped_waiting_reqs=4), None)
    messages(port, (0.0, 7, 5))
    publisher.close()


def test_load_publisher_any_vllms_arguments_are_taken_and_nothing_is_raised(publisher_class, port, messages, caplog):
    publisher = publisher_class(None, 0, endpoint=f"tcp://127.0.0.1:{port}")
    publisher.record(None, None)
    publisher.record(scheduler_stats=None, iteration_stats=None, something_new=1)
    publisher.record(Stats(0.5, 1, 2), None, None, 0, "one more")
    messages(port, (0.5, 1, 2))
    for broken in (object(), Stats("full", 1, 1), Stats(0.5, None, 1)):
        publisher.record(broken, None)
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1
    publisher.record(Stats(0.75, 2, 2), None)
    messages(port, (0.75, 2, 2))
    publisher.log_engine_initialized()
    publisher.close()


@pytest.mark.parametrize(
    ("variable", "value"), [("KVROUTER_LOAD_ENDPOINT", "nonsense"), ("KVROUTER_BASE_METRICS_PORT", "99999")]
)
def test_load_publisher_bad_value_is_one_warning_naming_the_variable(
    publisher_class, monkeypatch, caplog, variable, value
):
    monkeypatch.setenv(variable, value)
    publisher = publisher_class(None, 0)
    publisher.record(Stats(0.5, 1, 2), None)
    assert len(caplog.records) == 1
    assert variable in caplog.records[0].getMessage()
    assert value in caplog.records[0].getMessage()


def test_load_publisher_several_server_processes_are_warned_about_once(publisher_class, monkeypatch, port, caplog):
    monkeypatch.setenv("KVROUTER_LOAD_ENDPOINT", f"tcp://127.0.0.1:{port}")
    for rank in range(3):
        config = types.SimpleNamespace(
            parallel_config=types.SimpleNamespace(_api_process_count=3, _api_process_rank=rank)
        )
        assert publisher_class(config, 0).endpoint is None
    assert [record.getMessage() for record in caplog.records] == [
        "load is not published, although KVROUTER_LOAD_ENDPOINT asks for it: start vLLM with --api-server-count 1"
    ]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", port))


def test_kvrouter_vllm_import_needs_no_vllm():
    program = (
        "import sys\n"
        "sys.modules['vllm'] = sys.modules['zmq'] = None\n"
        "import kvrouter.vllm as worker_side\n"
        "print(worker_side.kv_events_config(0)['endpoint'], worker_side.launch_workers.__name__)\n"
        "try:\n"
        "    worker_side.LoadPublisher\n"
        "except ImportError as error:\n"
        "    print('vllm' in str(error))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["tcp://*:5557", "launch_workers", "True"]
