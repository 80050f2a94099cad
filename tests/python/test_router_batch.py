"""Batches: one call decides for all, and the decisions know of each other."""

from __future__ import annotations

import asyncio
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrouter import KvRouter, compute_block_hashes


def groups(num_groups: int, samples: int, tokens: int = 640) -> np.ndarray:
    """(num_groups * samples, tokens) int64: the samples of a prompt follow each other."""
    rng = np.random.default_rng(num_groups)
    return np.repeat(rng.integers(0, 30_000, (num_groups, tokens)), samples, axis=0)


def test_sixteen_samples_neither_scatter_nor_pile_up():
    router = KvRouter(num_workers=32, seed=3)
    workers, overlap = router.route_batch(groups(1, 16))
    counts = Counter(workers.tolist())
    assert 2 <= len(counts) <= 6
    assert max(counts.values()) <= 8
    assert (overlap > 0).sum() == 16 - len(counts)
    assert workers.dtype == overlap.dtype == np.uint32


@settings(deadline=None, max_examples=40)
@given(st.integers(8, 64), st.sampled_from([8, 16]), st.integers(0, 99))
def test_groups_are_balanced_and_kept_together(num_groups, samples, seed):
    router = KvRouter(num_workers=32, seed=seed)
    workers, _ = router.route_batch(groups(num_groups, samples))
    assert Counter(workers.tolist()).most_common(1)[0][1] <= 1.5 * num_groups * samples / 32
    used = [len(set(workers[i * samples : (i + 1) * samples].tolist())) for i in range(num_groups)]
    assert np.mean(used) <= 1 + 2 * max(1, 32 / num_groups)


def test_padding_does_not_count():
    tokens = groups(3, 4)
    lengths = [640, 600, 512, 100] * 3
    padded = tokens.copy()
    for row, length in zip(padded, lengths, strict=True):
        row[length:] = -100  # no token id: not looked at
    ragged = [row[:length] for row, length in zip(tokens, lengths, strict=True)]
    chosen = [KvRouter(num_workers=4, seed=1).route_batch(padded, lengths)]
    chosen.append(KvRouter(num_workers=4, seed=1).route_batch(padded[:, ::1], np.array(lengths, np.int32)))
    chosen.append(KvRouter(num_workers=4, seed=1).route_batch(ragged))
    chosen.append(KvRouter(num_workers=4, seed=1).route_batch([row.tolist() for row in ragged]))
    hashes = [compute_block_hashes(row) for row in ragged]
    chosen.append(KvRouter(num_workers=4, seed=1).route_batch(hashes=hashes, num_tokens=lengths))
    for workers, overlap in chosen[1:]:
        assert workers.tolist() == chosen[0][0].tolist()
        assert overlap.tolist() == chosen[0][1].tolist()


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.uint16, np.int64])
def test_kinds_of_arrays(dtype):
    tokens = groups(4, 4)
    expected = KvRouter(num_workers=4, seed=1).route_batch(tokens)[0].tolist()
    for array in (tokens.astype(dtype), np.asfortranarray(tokens.astype(dtype))):
        assert KvRouter(num_workers=4, seed=1).route_batch(array)[0].tolist() == expected


def test_the_guides_name():
    tokens = groups(2, 4).tolist()
    hashes = [compute_block_hashes(row).tolist() for row in tokens]
    lengths = [640] * 8

    def ask(*arguments):
        return asyncio.run(KvRouter(num_workers=4, seed=1).get_best_worker_ids_batch(*arguments))

    expected = ask(hashes, lengths)
    assert len(expected) == 8
    assert all(type(worker) is int for worker in expected)
    assert ask(tokens, lengths) == expected
    assert ask(tokens) == expected
    assert ask([], []) == []
    with pytest.raises(ValueError, match="batch_hashes has 8 entries, batch_num_tokens has 7"):
        ask(hashes, lengths[:7])
    with pytest.raises(ValueError, match="mixes"):
        ask([hashes[0], tokens[0]], [640, 640])
    with pytest.raises(ValueError, match="num_tokens"):
        ask(hashes, [0] * 8)


def test_adapters_share_nothing():
    router = KvRouter(num_workers=2)
    tokens = list(range(64))
    router._core.index.store(1, None, compute_block_hashes(tokens, lora_name="a"), [1])
    assert router.route_batch([tokens])[1].tolist() == [0]
    router._core.update_load(0, 0, 0)
    router._core.update_load(1, 0, 0)
    workers, overlap = router.route_batch([tokens], lora_name="a")
    assert (workers.tolist(), overlap.tolist()) == ([1], [1])


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({}, "give either"),
        ({"tokens": [[1]], "hashes": [[1]], "num_tokens": [64]}, "give either"),
        ({"hashes": [[1]]}, "give either"),
        ({"hashes": [[1]], "num_tokens": [64], "lora_name": "a"}, "lora_name"),
        ({"hashes": [[1], [2]], "num_tokens": [64]}, "hashes has 2 entries, num_tokens has 1"),
        ({"tokens": [[1], []]}, "request 1 of the batch: its length must be from 1 to 0"),
        ({"tokens": np.ones((2, 3), np.int64), "lengths": [3, 4]}, "request 1 of the batch: its length"),
        ({"tokens": np.ones((2, 3), np.int64), "lengths": [3]}, "lengths has 1 entries, tokens has 2"),
        ({"tokens": np.ones((2, 3), np.int64), "lengths": [3, 0]}, "lengths: the value at position 1"),
        ({"tokens": np.ones((2, 3), np.int64), "lengths": np.array([3, -1])}, "lengths: the value at position 1"),
        ({"tokens": np.array([[1, -1]])}, "tokens: the value at position 1 is out of range"),
    ],
)
def test_bad_batches(arguments, error):
    router = KvRouter(num_workers=2)
    with pytest.raises(ValueError, match=error):
        router.route_batch(**arguments)
    assert router.status()["decisions"] == 0


@pytest.mark.parametrize("tokens", [np.ones(3, np.int64), np.ones((2, 2)), "text", 7, [["a"]], [1, 2]])
def test_what_is_no_batch(tokens):
    with pytest.raises(TypeError, match="tokens must be"):
        KvRouter(num_workers=2).route_batch(tokens)


def test_tickets_tell_the_router_what_became_of_requests():
    router = KvRouter(num_workers=2, policy="adaptive")
    workers, overlap, tickets = router.dispatch_batch(groups(4, 4))
    assert len(workers) == len(overlap) == len(set(tickets.tolist())) == 16
    assert tickets.dtype == np.uint64
    decision = router.route(groups(1, 1)[0])
    for ticket in [*tickets, decision.ticket]:
        assert router.first_token(ticket)
        assert router.complete(ticket, output_tokens=12)
        assert not router.complete(ticket)
    assert not router.complete(0)
    _, _, tickets = router.dispatch_batch(hashes=[[1, 2]], num_tokens=[130])
    assert router.complete(tickets[0], first_token_s=0.2)


def test_policies_without_an_account_give_no_tickets():
    router = KvRouter(num_workers=2)
    assert router.dispatch_batch(groups(1, 2))[2].tolist() == [0, 0]
    assert router.route([1] * 64).ticket == 0
    assert not router.first_token(0)
