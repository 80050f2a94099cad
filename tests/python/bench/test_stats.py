from __future__ import annotations

import statistics

import pytest
from bench_support import record
from hypothesis import given
from hypothesis import strategies as st

from kvrouter.bench.counters import CacheCounters, hit_rate, parse_counters
from kvrouter.bench.stats import (
    ecdf,
    median_of,
    percentiles,
    prediction_agreement,
    spread_of,
    summarize,
)
from kvrouter.prediction import expected_cached_tokens

numbers = st.floats(0, 1e9, allow_nan=False)


@given(st.lists(numbers, min_size=1))
def test_percentiles_are_within_the_values_and_ordered(values):
    result = percentiles(values, (0, 50, 95, 100))
    assert result["p0"] == min(values)
    assert result["p100"] == max(values)
    assert result["p50"] == pytest.approx(statistics.median(values))
    assert result["p50"] <= result["p95"] * (1 + 1e-12)


def test_percentiles_of_nothing_are_nothing():
    assert percentiles([], (50, 99)) == {"p50": None, "p99": None}


@given(st.lists(numbers, min_size=1, max_size=50))
def test_ecdf_counts_the_values_at_or_below(values):
    x, share = ecdf(values)
    assert share[-1] == 1.0
    for value, part in zip(x, share, strict=True):
        assert part <= sum(v <= value for v in values) / len(values) + 1e-9
    assert sorted(values) == x


@given(st.integers(0, 200), st.integers(1, 5000), st.sampled_from([16, 64]))
def test_expected_cached_tokens_never_serves_the_whole_prompt(blocks, num_tokens, block_size):
    expected = expected_cached_tokens(blocks, num_tokens, block_size)
    assert expected % block_size == 0
    assert expected < num_tokens
    if blocks * block_size < num_tokens:
        assert expected == blocks * block_size
    else:
        assert num_tokens - expected <= block_size


@pytest.mark.parametrize(
    ("blocks", "num_tokens", "expected"),
    [(25, 1600, 1536), (24, 1600, 1536), (24, 1599, 1536), (0, 64, 0), (1, 65, 64)],
)
def test_expected_cached_tokens_examples(blocks, num_tokens, expected):
    assert expected_cached_tokens(blocks, num_tokens, 64) == expected


def test_prediction_agreement_counts_only_requests_with_both_figures():
    records = [
        record(0, 0, predicted_blocks=2, cached_tokens=32),
        record(1, 0, predicted_blocks=3, cached_tokens=32),
        record(2, 0, predicted_blocks=None, cached_tokens=32),
        record(3, 0, predicted_blocks=2, cached_tokens=None),
    ]
    assert prediction_agreement(records, 16) == 0.5
    assert prediction_agreement(records[2:], 16) is None


def test_summary_counts_answers_failures_and_workers():
    records = [record(i, [0, 1, 1, None][i % 4]) for i in range(8)]
    records[0].attempts = 2
    records[1].router_us = None
    figures = summarize(records, wall_s=2.0, hit_rate=0.5, num_workers=3, block_size=16)
    assert figures["requests_per_worker"] == [2, 4, 0]
    assert figures["requests_per_s"] == 3.0
    assert figures["tokens_per_s"] == 6 * 16 / 2.0
    assert (figures["requests"], figures["failed"], figures["retried"], figures["without_router"]) == (8, 2, 1, 1)
    assert set(figures["ttft_ms"]) == set(figures["latency_ms"]) == {"p50", "p95", "p99"}
    assert set(figures["router_us"]) == {"p50", "p99"}


@given(st.lists(st.fixed_dictionaries({"a": numbers, "b": st.fixed_dictionaries({"c": numbers})}), min_size=1))
def test_median_lies_within_the_spread(runs):
    median, spread = median_of(runs), spread_of(runs)
    assert spread["a"][0] <= median["a"] <= spread["a"][1]
    assert spread["b"]["c"] == [min(r["b"]["c"] for r in runs), max(r["b"]["c"] for r in runs)]


def test_median_leaves_out_what_a_run_lacks_and_goes_by_worker():
    runs = [{"x": None, "w": [1, 9]}, {"x": 2.0, "w": [3, 7]}, {"x": 4.0, "w": [5, 5]}]
    assert median_of(runs) == {"x": 3.0, "w": [3, 7]}
    assert spread_of(runs) == {"x": [2.0, 4.0], "w": [[1, 5], [5, 9]]}
    assert median_of([{"x": None}])["x"] is None


PAGE = """# HELP vllm:prefix_cache_queries_total Prefix cache queries
# TYPE vllm:prefix_cache_queries_total counter
vllm:prefix_cache_queries_total{engine="0",model_name="a } b"} 1600.0
vllm:prefix_cache_queries_total{engine="1",model_name="a"} 400.0
vllm:prefix_cache_queries_created{engine="0"} 1.7e+09
vllm:prefix_cache_hits_total{engine="0",model_name="a } b"} 1.2e+03
vllm:prefix_cache_hits_total{engine="1",model_name="a"} 0.0
vllm:external_prefix_cache_queries_total{engine="0"} 77
"""


def test_counters_are_summed_over_engines():
    assert parse_counters(PAGE) == CacheCounters(2000.0, 1200.0)


def test_counters_without_labels():
    assert parse_counters("vllm:prefix_cache_queries_total 8\nvllm:prefix_cache_hits_total 2\n") == CacheCounters(8, 2)


def test_missing_counter_is_named():
    with pytest.raises(ValueError, match="prefix_cache_hits_total"):
        parse_counters("vllm:prefix_cache_queries_total 8\n")


@pytest.mark.parametrize("value", ["", "x", "nan", "inf", "-1"])
def test_counter_that_is_no_count_is_refused(value):
    with pytest.raises(ValueError, match="/metrics"):
        parse_counters(f"vllm:prefix_cache_queries_total {value}\nvllm:prefix_cache_hits_total 1\n")


@given(st.text())
def test_any_page_is_read_or_refused(page):
    try:
        parse_counters(page)
    except ValueError as error:
        assert "/metrics" in str(error)


def test_hit_rate_is_the_difference_and_leaves_out_unread_workers():
    before = [CacheCounters(100, 50), CacheCounters(0, 0), None]
    after = [CacheCounters(300, 150), None, CacheCounters(9, 9)]
    assert hit_rate(before, after) == 0.5
    assert hit_rate(before[:1], before[:1]) is None
