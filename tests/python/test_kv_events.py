"""The event decoder against batches that msgpack encodes, in both layouts; the index against a naive model."""

from __future__ import annotations

import msgpack
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import kvrouter
from kvrouter._core import KvEventDecoder, PrefixIndex

BLOCK = 4
u64 = st.integers(0, 2**64 - 1)
engine_hashes = st.one_of(u64, st.binary(min_size=32, max_size=32))
unknown_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def stored_events(draw):
    count = draw(st.integers(1, 4))
    return {
        "type": "BlockStored",
        "block_hashes": draw(st.lists(engine_hashes, min_size=count, max_size=count, unique=True)),
        "parent_block_hash": draw(st.none() | engine_hashes),
        "token_ids": draw(st.lists(st.integers(0, 2**32 - 1), min_size=BLOCK * count, max_size=BLOCK * count)),
        "block_size": BLOCK,
        "lora_id": None,
        "medium": draw(st.sampled_from([None, "GPU"])),
        "lora_name": draw(st.none() | st.text(min_size=1, max_size=5)),
        "extra_keys": draw(
            st.none()
            | st.lists(
                st.none()
                | st.lists(
                    st.text(max_size=3) | st.integers(-5, 5) | st.lists(st.text(max_size=2), max_size=2), min_size=1
                ),
                min_size=count,
                max_size=count,
            )
        ),
    }


def as_array(event):
    """The layout by position, what is at its default left off the end."""
    values = list(event.values())
    while values[-1] is None:
        values.pop()
    return values


def decode(events, block_size=BLOCK):
    decoder = KvEventDecoder(block_size)
    decoded, error = decoder.decode(msgpack.packb([0.5, events, 0]))
    return decoded, error, decoder.counts


@given(st.lists(stored_events(), max_size=4))
def test_both_layouts_decode_alike_and_hash_as_requests_do(events):
    as_maps, error, _ = decode(events)
    assert error is None
    assert as_maps == decode([as_array(event) for event in events])[0]
    assert len(as_maps) == len(events)
    for event, (kind, parent, blocks) in zip(events, as_maps, strict=True):
        assert kind == "stored"
        assert (parent is None) == (event["parent_block_hash"] is None)
        requested = kvrouter.compute_block_hashes(
            event["token_ids"], BLOCK, lora_name=event["lora_name"], extra_keys=event["extra_keys"]
        )
        assert [local for local, _ in blocks] == requested.tolist()
        for name, (_, engine) in zip(event["block_hashes"], blocks, strict=True):
            assert isinstance(name, bytes) or engine == name


@given(stored_events(), st.dictionaries(st.text(min_size=1, max_size=8), unknown_values, max_size=4))
def test_unknown_fields_change_nothing(event, unknown):
    unknown = {key: value for key, value in unknown.items() if key not in event}
    known_but_unused = {"group_idx", "kv_cache_spec_kind", "locality", "ownership", "session_id"}
    unknown = {key: value for key, value in unknown.items() if key not in known_but_unused}
    decoded, error, counts = decode([{**unknown, **event}])
    assert error is None
    assert decoded == decode([event])[0]
    assert counts["skipped_unknown_field"] == len(unknown)


@given(unknown_values)
def test_what_is_no_event_costs_itself_only(value):
    if isinstance(value, dict):
        value.pop("type", None)
    if isinstance(value, list):
        value = ["NoSuchEvent", *value]
    decoded, error, _ = decode([value, {"type": "BlockRemoved", "block_hashes": [3], "medium": None}])
    assert error is None
    assert decoded == [("removed", [3])]


@given(st.binary(max_size=200))
def test_any_bytes(payload):
    KvEventDecoder(BLOCK).decode(payload)


class NaiveWorker:
    """A worker's overlap is the number of leading blocks of the request that it holds."""

    def __init__(self):
        self.children, self.held = {}, set()

    def store(self, parent, blocks):
        for local, engine in blocks:
            self.children[parent, local] = engine
            self.held.add(engine)
            parent = engine

    def overlap(self, locals_):
        at, depth = None, 0
        for local in locals_:
            at = self.children.get((at, local))
            if at not in self.held:
                break
            depth += 1
        return depth


paths = st.lists(st.integers(1, 3), min_size=1, max_size=5)
operations = st.lists(st.tuples(st.sampled_from("ssssrrc"), st.integers(0, 2), paths, st.integers(0, 4)), max_size=60)


@given(operations)
def test_index_answers_as_the_naive_model(ops):
    index, naive = PrefixIndex(3), [NaiveWorker() for _ in range(3)]

    def name(worker, path):
        return hash((worker, *path)) & (2**64 - 1)

    for kind, worker, path, cut in ops:
        start = cut % len(path)
        if kind == "s":
            parent = name(worker, path[:start]) if start else None
            blocks = [(path[i], name(worker, path[: i + 1])) for i in range(start, len(path))]
            index.store(worker, parent, [local for local, _ in blocks], [engine for _, engine in blocks])
            naive[worker].store(parent, blocks)
        elif kind == "r":
            index.remove(worker, [name(worker, path[: start + 1])])
            naive[worker].held.discard(name(worker, path[: start + 1]))
        else:
            index.clear(worker)
            naive[worker].held.clear()
        for _, _, query, _ in ops:
            expected = [model.overlap(query) for model in naive]
            assert index.find_matches(np.array(query, np.uint64)).tolist() == expected
