"""The service in front of simulated workers in this process."""

from __future__ import annotations

import contextlib
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvrouter.serve import KvService, ServeOptions
from kvrouter.sim import SimWorker
from kvrouter.worker_spec import WorkerSpec

BLOCK_SIZE = 16


def sim_worker(**options: Any) -> SimWorker:
    """A simulated worker on free ports."""
    defaults = {
        "port": 0,
        "kv_events_endpoint": "tcp://127.0.0.1:*",
        "load_endpoint": "tcp://127.0.0.1:*",
        "block_size": BLOCK_SIZE,
        "max_model_len": 1024,
        "time_scale": 0.0,
    }
    return SimWorker(**(defaults | options))


def spec_of(worker: SimWorker) -> WorkerSpec:
    return WorkerSpec(f"http://127.0.0.1:{worker.port}", worker.kv_events_endpoint, "", worker.load_endpoint)


def wait_for(condition: Callable[[], Any], timeout_s: float = 30.0) -> Any:
    """The condition's first true value."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.02)
    return value


class Client:
    """Plain HTTP to the service."""

    def __init__(self, url: str, token: str = "") -> None:
        self.url = url
        self.headers = {"Authorization": f"Bearer {token}"} if token else {}

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None):
        """(status, headers, body as bytes)."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data=data, method=method, headers=self.headers | (headers or {})
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read()

    def json(self, method: str, path: str, body: Any = None) -> Any:
        status, _, answer = self.ask(method, path, body)
        assert status < 400, (status, answer)
        return json.loads(answer)

    def metrics(self) -> dict[str, float]:
        """The samples of /metrics by name and labels."""
        status, _, page = self.ask("GET", "/metrics")
        assert status == 200
        samples = (line.rpartition(" ") for line in page.decode().splitlines() if not line.startswith("#"))
        return {name: float(value) for name, _, value in samples}

    def workers(self) -> list[dict[str, Any]]:
        return self.json("GET", "/workers")["workers"]


@contextlib.contextmanager
def served(workers: list[WorkerSpec], **options: Any) -> Iterator[Client]:
    """A service that has reached its workers."""
    limits = {"health_interval_s": 0.1} | options.pop("limits", {})
    with KvService(
        ServeOptions(workers=workers, port=0, block_size=BLOCK_SIZE, max_workers=4, limits=limits, **options)
    ) as service:
        client = Client(service.url, options.get("admin_token") or options.get("api_token") or "")
        wait_for(lambda: all(w["healthy"] and w["models"] for w in client.workers()))
        wait_for(lambda: all(w["state"] == "up" for w in client.workers()))
        yield client


@pytest.fixture
def two_workers() -> Iterator[list[SimWorker]]:
    with sim_worker() as first, sim_worker() as second:
        yield [first, second]


@pytest.fixture
def gateway(two_workers: list[SimWorker]) -> Iterator[Client]:
    with served([spec_of(worker) for worker in two_workers]) as client:
        yield client
