"""Requests through the gateway find as much in the workers' caches as those that a router in the client sends."""

from __future__ import annotations

from statistics import median

from kvrouter.bench.gateway import compare
from kvrouter.bench.settings import BenchSettings, EngineName, WorkloadName

NUM_PREFIXES, NUM_REQUESTS = 24, 480


def test_the_gateway_and_an_in_process_router_hit_alike():
    # 24 prefixes of 24 blocks fit two caches of 448 blocks with room for chance, but not one: what is sent to the
    # wrong worker pushes out what others need.
    settings = BenchSettings(
        engine=EngineName.SIM,
        workload=WorkloadName.THRASH,
        num_prefixes=NUM_PREFIXES,
        num_requests=NUM_REQUESTS,
        time_scale=0.05,
    )
    result = compare(settings, repeats=3)
    assert result.num_requests == NUM_REQUESTS
    best = (1 - NUM_PREFIXES / NUM_REQUESTS) * settings.prefix_len / settings.seq_len
    for way, rates in result.hit_rates.items():
        assert max(rates) <= best + 1e-9, way
        assert median(rates) > best - 0.02, way
    assert abs(result.difference) <= 0.01
