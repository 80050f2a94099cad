"""``kvrouter doctor``: each trouble is found, and a healthy fleet has none."""

from __future__ import annotations

import socket

import pytest
from typer.testing import CliRunner

from conftest import BLOCK_SIZE, served, sim_worker, spec_of
from kvrouter.cli import app
from kvrouter.doctor import examine_service, examine_worker
from kvrouter.service_client import ServiceClient
from kvrouter.worker_spec import WorkerSpec

pytest.importorskip("zmq", reason="pyzmq is not installed")


def argument(worker):
    spec = spec_of(worker)
    return f"{spec.url},kv_events={spec.kv_events},load={spec.load}"


def test_a_healthy_worker_has_no_trouble():
    with sim_worker(vocab_size=1024) as worker:
        findings = list(examine_worker(spec_of(worker), BLOCK_SIZE, 20, probe=True))
        assert [f.text for f in findings if f.ok is not True] == []
        assert any("in order" in f.text for f in findings)
        result = CliRunner().invoke(app, ["doctor", "--worker", argument(worker), "--block-size", str(BLOCK_SIZE)])
    assert result.exit_code == 0, result.output


def test_a_block_size_that_differs():
    with sim_worker() as worker:
        (bad,) = [f for f in examine_worker(spec_of(worker), 64, 20, probe=True) if f.ok is False]
        assert "--block-size" in bad.help
        result = CliRunner().invoke(app, ["doctor", "--worker", argument(worker), "--block-size", "64"])
    assert result.exit_code == 1
    assert "--block-size 64" in result.output


def test_nobody_there_and_a_port_that_another_has():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        other.settimeout(0.1)
    (gone,) = examine_worker(WorkerSpec(f"http://127.0.0.1:{port}"), None, 0.1, probe=False)
    assert gone.ok is False
    assert "nothing listens" in gone.help


def test_publishers_that_are_missing():
    with sim_worker(kv_events_endpoint="", load_endpoint="") as worker:
        url = f"http://127.0.0.1:{worker.port}"
        findings = list(examine_worker(WorkerSpec(url), None, 0.2, probe=True))
        assert any("--kv-events-config" in f.help for f in findings if f.ok is False)
        spec = WorkerSpec(url, "tcp://127.0.0.1:1", "", "tcp://127.0.0.1:1")
        findings = [f for f in examine_worker(spec, None, 0.5, probe=True) if f.ok is False]
    assert any("KVROUTER_LOAD_ENDPOINT" in f.help for f in findings)
    assert any("enable_kv_cache_events" in f.help and "nothing listens" in f.text for f in findings)


def test_prefix_caching_off_publishes_nothing():
    with sim_worker(prefix_caching=False) as worker:
        findings = [f for f in examine_worker(spec_of(worker), None, 1.0, probe=True) if f.ok is False]
    assert any("prefix caching" in f.help for f in findings)


def test_a_service_whose_traffic_shares_nothing():
    with sim_worker() as worker, served([spec_of(worker)], limits={"health_interval_s": 0.05}) as client:
        (early,) = examine_service(ServiceClient(client.url), 1)
        assert (early.ok, "warming up" in early.text) == (None, True)
        for i in range(60):
            client.ask("POST", "/v1/completions", {"prompt": [i + 5] + [7] * 40, "max_tokens": 1})
        assert any("has 1 workers, not 2" in f.text for f in examine_service(ServiceClient(client.url), 2))
    (gone,) = examine_service(ServiceClient(client.url), 1)
    assert gone.ok is False
