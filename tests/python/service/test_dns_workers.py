"""A DNS name with many addresses, by a resolver of the test's own."""

from __future__ import annotations

import logging

import pytest

from conftest import served, sim_worker, spec_of, wait_for
from kvrouter.dns_workers import DnsWorkers, resolve
from kvrouter.service_client import ServiceClient
from kvrouter.worker_spec import DnsSpec, WorkerSpec, parse_workers


class Names:
    """A resolver whose answer is set."""

    def __init__(self, addresses: list[str] | None) -> None:
        self.addresses = addresses
        self.asked: list[str] = []

    def __call__(self, name: str) -> list[str]:
        self.asked.append(name)
        if self.addresses is None:
            raise OSError("Temporary failure in name resolution")
        return self.addresses


def test_addresses_come_and_go(caplog):
    # All of 127.0.0.0/8 is this machine: one worker, listening on every address, is many.
    with sim_worker(host="0.0.0.0", kv_events_endpoint="", load_endpoint="") as worker, sim_worker() as other:
        names = Names(["127.0.0.1", "127.0.0.2"])
        with served([spec_of(other)]) as client:
            spec = DnsSpec.parse(f"dns://workers.test:{worker.port}")
            followed = DnsWorkers(spec, ServiceClient(client.url), 0.0, names)

            def urls():
                return {w["url"] for w in client.workers()} - {spec_of(other).url}

            def at(*numbers):
                return {f"http://127.0.0.{n}:{worker.port}" for n in numbers}

            followed.follow()
            assert urls() == at(1, 2)
            wait_for(lambda: all(w["healthy"] and w["models"] for w in client.workers()))
            names.addresses = ["127.0.0.2", "127.0.0.3"]
            followed.follow()
            assert urls() == at(2, 3)
            wait_for(lambda: all(w["healthy"] for w in client.workers()))
            # A name server that is down takes no worker away, and is said once.
            names.addresses = None
            with caplog.at_level(logging.WARNING, "kvrouter"):
                followed.follow()
                followed.follow()
            assert urls() == at(2, 3)
            assert caplog.text.count("workers.test cannot be looked up") == 1
            # Nor is a worker that was added in another way this name's to remove.
            names.addresses = []
            followed.follow()
            assert urls() == set()
            assert len(client.workers()) == 1
            assert set(names.asked) == {"workers.test"}


def test_it_waits_between_two_look_ups():
    names = Names([])
    with served([]) as client:
        followed = DnsWorkers(DnsSpec.parse("dns://h:1"), ServiceClient(client.url), 3600.0, names)
        for _ in range(3):
            followed.follow()
    assert len(names.asked) == 1


def test_a_service_that_is_gone_is_no_end(caplog):
    with served([]) as client:
        service = ServiceClient(client.url, timeout_s=1)
    with caplog.at_level(logging.WARNING, "kvrouter"):
        DnsWorkers(DnsSpec.parse("dns://h:1"), service, 0.0, Names(["127.0.0.1"])).follow()
    assert "stay as they are" in caplog.text


def test_the_systems_resolver():
    assert "127.0.0.1" in resolve("localhost")
    assert resolve("127.0.0.1") == ["127.0.0.1"]


def test_what_an_address_stands_for():
    spec = DnsSpec.parse("dns://w:8000,kv_events=tcp://*:5557,data_parallel_size=2")
    assert spec.at("10.0.0.1") == WorkerSpec("http://10.0.0.1:8000", "tcp://10.0.0.1:5557", data_parallel_size=2)
    assert spec.at("fd00::1").kv_events == "tcp://[fd00::1]:5557"
    assert DnsSpec.parse("dnss://w:8000").at("10.0.0.1").url == "https://10.0.0.1:8000"
    servers, names = parse_workers(["http://h:1", "dns://w:2"])
    assert ([s.url for s in servers], [n.host for n in names]) == (["http://h:1"], ["w"])
    for text in ("dns://w", "dns://w:1/x", "dns://w:1,kv_events=tcp://host:5557", "dns://w:1,kv_events=tcp://*"):
        with pytest.raises(ValueError, match="--worker"):
            DnsSpec.parse(text)
