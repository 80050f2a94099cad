from __future__ import annotations

import numpy as np
import pytest

from kvrouter.ray.engine.base import RoutingNote, SampleRequest, SampleResult
from kvrouter.ray.router_metrics import Ledger, summed_up


def serve(ledger: Ledger, note: RoutingNote | None, cached: int = 0, prompt: int = 128, generated: int = 2) -> None:
    result = SampleResult(np.zeros(generated, np.int64), np.zeros(generated, np.float32), True, cached)
    ledger.record(SampleRequest(np.zeros(prompt, np.int64), decision=note), result, block_size=64)


def test_figures_of_a_fleet():
    first, second = Ledger(), Ledger()
    serve(first, RoutingNote(overlap_blocks=2, wait_s=100e-6), cached=64)
    serve(first, RoutingNote(overlap_blocks=0, wait_s=300e-6))
    serve(second, RoutingNote(None, fallback=True, retries=2))
    figures = summed_up([first, second])
    assert figures["decisions"] == 2
    assert figures["decision_us_p50"] == pytest.approx(200)
    # Two blocks of a prompt of two blocks: the last token is always computed.
    assert figures["predicted_hit_rate"] == 64 / 256
    assert figures["actual_hit_rate"] == 64 / 384
    assert figures["requests_per_worker"] == [2, 1]
    assert figures["tokens_per_worker"] == [260, 130]
    assert figures["imbalance"] == pytest.approx(260 / 195)
    assert (figures["fallbacks"], figures["retries"]) == (1, 2)


def test_requests_that_nobody_routed_count_as_requests_only():
    ledger = Ledger()
    serve(ledger, None, cached=64)
    figures = summed_up([ledger])
    assert (figures["decisions"], figures["decision_us_p50"], figures["predicted_hit_rate"]) == (0, None, None)
    assert figures["actual_hit_rate"] == 0.5


def test_before_the_first_request():
    figures = summed_up([Ledger(), Ledger()])
    assert figures["requests_per_worker"] == [0, 0]
    assert figures["imbalance"] is None
    assert figures["actual_hit_rate"] is None
