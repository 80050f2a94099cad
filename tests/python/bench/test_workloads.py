from __future__ import annotations

import collections
import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrouter.bench.settings import FIRST_TOKEN_ID, BenchSettings, WorkloadName
from kvrouter.bench.workloads import (
    Group,
    Shared,
    Thrash,
    Unique,
    make_workloads,
    thrash_num_prefixes,
)

shapes = st.fixed_dictionaries(
    {
        "num_requests": st.integers(1, 80),
        "prompt_len": st.integers(20, 60),
        "max_tokens": st.integers(1, 8),
        "vocab_size": st.integers(16, 2000),
        "seed": st.integers(0, 2**31),
    }
)
workloads = st.one_of(
    shapes.map(lambda shape: Unique(**shape)),
    st.builds(lambda shape, size: Group(**shape, group_size=size), shapes, st.integers(1, 12)),
    st.builds(
        lambda kind, shape, count, length: kind(**shape, num_prefixes=count, prefix_len=length),
        st.sampled_from([Shared, Thrash]),
        shapes,
        st.integers(1, 30),
        st.integers(8, 15),
    ),
)


@given(workloads)
@settings(max_examples=200, deadline=None)
def test_requests_have_the_shape_asked_for(workload):
    requests = workload.requests()
    assert [request.index for request in requests] == list(range(workload.num_requests))
    for request in requests:
        assert request.tokens.shape == (workload.prompt_len,)
        assert request.tokens.dtype == np.uint32
        assert request.tokens.min() >= FIRST_TOKEN_ID
        assert request.tokens.max() < workload.vocab_size
        assert request.max_tokens == workload.max_tokens
    assert len({request.seed for request in requests}) == len(requests)


@given(workloads)
@settings(max_examples=100, deadline=None)
def test_same_seed_same_requests_and_another_seed_others(workload):
    first, again = workload.requests(), workload.requests()
    for a, b in zip(first, again, strict=True):
        assert (a.index, a.prefix_id, a.seed, a.temperature) == (b.index, b.prefix_id, b.seed, b.temperature)
        assert (a.tokens == b.tokens).all()
    other = dataclasses.replace(workload, seed=workload.seed + 1).requests()
    assert any((a.tokens != b.tokens).any() for a, b in zip(first, other, strict=True))


@given(workloads)
@settings(max_examples=200, deadline=None)
def test_prompts_share_exactly_what_their_prefix_ids_say(workload):
    """Same id: the same first `shared` tokens. Other id: a different first block of 4."""
    shared = getattr(workload, "prefix_len", workload.prompt_len)
    heads = {}
    for request in workload.requests():
        head = tuple(request.tokens[:shared])
        assert heads.setdefault(request.prefix_id, head) == head
    assert len({head[:4] for head in heads.values()}) == len(heads)


@given(workloads.filter(lambda workload: isinstance(workload, (Shared, Thrash, Unique))))
@settings(max_examples=100, deadline=None)
def test_no_prompt_comes_twice_unless_grouped(workload):
    requests = workload.requests()
    assert len({request.tokens.tobytes() for request in requests}) == len(requests)


@given(
    st.integers(1, 12),
    st.integers(1, 9).flatmap(lambda r: st.tuples(st.just(r), st.integers(0, 11))),
    st.integers(0, 9),
)
@settings(deadline=None)
def test_every_round_asks_for_each_prefix_once(num_prefixes, rounds_and_rest, seed):
    rounds, rest = rounds_and_rest
    count = rounds * num_prefixes + rest % num_prefixes
    ids = [r.prefix_id for r in Thrash(count, 20, num_prefixes=num_prefixes, prefix_len=16, seed=seed).requests()]
    for start in range(0, count - num_prefixes + 1, num_prefixes):
        assert sorted(ids[start : start + num_prefixes]) == list(range(num_prefixes))


def test_thrash_order_is_shuffled_anew_every_round():
    ids = [request.prefix_id for request in Thrash(128, 20, num_prefixes=32, prefix_len=16).requests()]
    rounds = {tuple(ids[start : start + 32]) for start in range(0, 128, 32)}
    assert len(rounds) == 4


@given(st.integers(1, 10), st.integers(1, 60))
@settings(deadline=None)
def test_group_sends_one_prompt_after_the_other(group_size, count):
    ids = [request.prefix_id for request in Group(count, 20, group_size=group_size).requests()]
    assert ids == sorted(ids)
    sizes = list(collections.Counter(ids).values())
    assert all(size == group_size for size in sizes[:-1])
    assert 1 <= sizes[-1] <= group_size


def test_thrash_of_the_default_fleet_is_32_prefixes():
    assert thrash_num_prefixes(num_blocks=448, num_workers=2, block_size=64, prefix_len=1536) == 32


@given(st.integers(8, 5000), st.integers(1, 16), st.sampled_from([16, 32, 64]), st.integers(1, 4000))
def test_thrash_prefixes_fit_the_fleet_and_not_one_worker(num_blocks, num_workers, block_size, prefix_len):
    try:
        count = thrash_num_prefixes(num_blocks, num_workers, block_size, prefix_len)
    except ValueError as error:
        assert "num" in str(error) or "prefix_len" in str(error)
        return
    blocks = count * (prefix_len // block_size)
    assert num_blocks < blocks < num_blocks * num_workers


@pytest.mark.parametrize("num_workers", [2, 3, 8])
def test_thrash_numbers_exist_for_ordinary_fleets(num_workers):
    assert thrash_num_prefixes(448, num_workers, 64, 1536) > 18


def test_thrash_with_one_worker_is_refused_by_name():
    with pytest.raises(ValueError, match="--num-workers 2"):
        thrash_num_prefixes(448, 1, 64, 1536)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Unique(0, 10), "num_requests"),
        (lambda: Unique(1, 0), "prompt_len"),
        (lambda: Unique(1, 10, max_tokens=0), "max_tokens"),
        (lambda: Unique(1, 10, vocab_size=4), "vocab_size"),
        (lambda: Shared(1, 10, prefix_len=10), "prefix_len"),
        (lambda: Shared(1, 10, prefix_len=5, num_prefixes=0), "num_prefixes"),
        (lambda: Group(1, 10, group_size=0), "group_size"),
        (lambda: Unique(100, 1, vocab_size=16).requests(), "make them longer"),
    ],
)
def test_impossible_workloads_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_all_means_the_four_in_order():
    made = make_workloads(BenchSettings(workload=WorkloadName.ALL))
    assert [workload.name for workload in made] == ["shared", "thrash", "group", "unique"]
    one = make_workloads(BenchSettings(workload=WorkloadName.GROUP, num_requests=24, group_size=6))
    assert [(workload.name, workload.num_requests) for workload in one] == [("group", 24)]
    assert len({request.prefix_id for request in one[0].requests()}) == 4


def test_batch_size_times_iterations_is_the_number_of_requests():
    made = make_workloads(BenchSettings(workload=WorkloadName.UNIQUE, batch_size=8, num_iterations=5))
    assert made[0].num_requests == 40


def test_group_samples_at_temperature_one_unless_told_otherwise():
    assert make_workloads(BenchSettings(workload=WorkloadName.GROUP))[0].temperature == 1.0
    assert make_workloads(BenchSettings(workload=WorkloadName.THRASH))[0].temperature == 0.0
    told = BenchSettings(workload=WorkloadName.ALL, generation_temperature=0.5)
    assert {workload.temperature for workload in make_workloads(told)} == {0.5}


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"batch_size": 4}, "--num-iterations"),
        ({"batch_size": 4, "num_iterations": 2, "num_requests": 8}, "--num-requests"),
        ({"num_blocks": 20}, "--num-blocks"),
        ({"prefix_len": 1600}, "--prefix-len"),
        ({"prefix_len": 63}, "--prefix-len"),
        ({"base_kv_events_port": 65535}, "--base-kv-events-port"),
        ({"base_metrics_port": 0}, "--base-metrics-port"),
        ({"base_kv_events_port": 5557, "base_metrics_port": 5558}, "overlap"),
    ],
)
def test_settings_that_do_not_fit_name_the_flag(options, flag):
    with pytest.raises(ValueError, match=flag):
        BenchSettings(**options).validate()


def test_default_settings_fit():
    for workload in WorkloadName:
        BenchSettings(workload=workload).validate()
    assert BenchSettings().max_model_len == 1664
