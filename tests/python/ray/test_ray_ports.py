from __future__ import annotations

import socket

import pytest

from kvrouter.ray.ports import claim_ports
from kvrouter.vllm.ports import find_free_ports

OFFSET = 100


@pytest.fixture
def free_base():
    """A port that is free, and the one OFFSET above it, too."""
    while True:
        first = find_free_ports(1)
        base = first.base
        first.release()
        with socket.socket() as probe:
            try:
                probe.bind(("", base + OFFSET))
            except OSError:
                continue
        return base


def test_base_ports_are_taken_when_free(free_base):
    claim = claim_ports(free_base, OFFSET)
    try:
        assert (claim.ports.kv_events, claim.ports.load) == (free_base, free_base + OFFSET)
        assert claim.ports.replay not in (claim.ports.kv_events, claim.ports.load)
    finally:
        claim.release()


@pytest.mark.parametrize("taken", [0, OFFSET])
def test_other_ports_as_far_apart_when_one_is_taken(free_base, taken):
    with socket.socket() as server:
        server.bind(("", free_base + taken))
        server.listen()
        claim = claim_ports(free_base, OFFSET)
        try:
            assert claim.ports.kv_events != free_base
            assert claim.ports.load == claim.ports.kv_events + OFFSET
        finally:
            claim.release()


def test_a_second_engine_does_not_get_a_claimed_port():
    first = claim_ports(1, OFFSET, prefer_base=False)
    second = claim_ports(1, OFFSET, prefer_base=False)
    try:
        ports = [getattr(claim.ports, name) for claim in (first, second) for name in ("kv_events", "load", "replay")]
        assert len(set(ports)) == 6
    finally:
        first.release()
        second.release()


def test_bases_too_far_apart():
    with pytest.raises(RuntimeError, match="base_kv_events_port and base_metrics_port"):
        claim_ports(1024, 65535)
