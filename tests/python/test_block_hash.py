"""Block hashes: equal to Dynamo's, from any kind of sequence."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

import kvrouter

dynamo = pytest.importorskip("dynamo._core", reason="ai-dynamo-runtime is not installed")

token_ids = st.integers(0, 2**32 - 1)
block_sizes = st.integers(1, 130)


def test_known_vector():
    assert kvrouter.compute_block_hash_for_seq([1, 2, 3, 4], 4) == [14643705804678351452]
    assert kvrouter.compute_block_hash_for_seq_py([1, 2, 3, 4], 4) == [14643705804678351452]


@given(st.lists(token_ids, max_size=400), block_sizes)
def test_equal_to_dynamo(tokens, block_size):
    expected = dynamo.compute_block_hash_for_seq(tokens, block_size)
    assert kvrouter.compute_block_hash_for_seq(tokens, block_size) == expected
    assert kvrouter.compute_block_hashes(tokens, block_size).tolist() == expected


@given(st.lists(token_ids, max_size=200), block_sizes, st.text(min_size=1, max_size=20))
def test_lora_name_equal_to_dynamo(tokens, block_size, lora_name):
    expected = dynamo.compute_block_hash_for_seq(tokens, block_size, lora_name=lora_name)
    assert kvrouter.compute_block_hash_for_seq(tokens, block_size, lora_name=lora_name) == expected


@given(st.lists(token_ids, min_size=1, max_size=100), st.integers(1, 16))
def test_the_formula(tokens, block_size):
    count = len(tokens) // block_size
    blocks = [tokens[i * block_size : (i + 1) * block_size] for i in range(count)]
    expected = [xxhash.xxh3_64_intdigest(struct.pack(f"<{block_size}I", *block), seed=1337) for block in blocks]
    assert kvrouter.compute_block_hashes(tokens, block_size).tolist() == expected


@given(st.lists(st.integers(0, 127), max_size=200), st.integers(1, 20), st.integers(1, 3))
def test_every_kind_of_array(tokens, block_size, step):
    expected = kvrouter.compute_block_hashes(tokens, block_size).tolist()
    for dtype in (np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64):
        spread = np.zeros(len(tokens) * step, dtype=dtype)
        spread[::step] = tokens
        assert kvrouter.compute_block_hashes(spread[::step], block_size).tolist() == expected
    assert kvrouter.compute_block_hashes(tuple(tokens), block_size).tolist() == expected
    assert kvrouter.compute_block_hashes([np.int64(t) for t in tokens], block_size).tolist() == expected


def test_torch_tensors():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    tokens = list(range(300))
    expected = kvrouter.compute_block_hashes(tokens, 64).tolist()
    for dtype in (torch.int32, torch.int64):
        assert kvrouter.compute_block_hashes(torch.tensor(tokens, dtype=dtype), 64).tolist() == expected


def test_read_only_arrays_are_taken():
    tokens = np.arange(128, dtype=np.uint32)
    tokens.flags.writeable = False
    assert len(kvrouter.compute_block_hashes(tokens, 64)) == 2


@pytest.mark.parametrize("bad", [[-1] * 4, [2**32] * 4, [2**70] * 4, np.array([-1] * 4), np.array([2**40] * 4)])
def test_ids_out_of_range(bad):
    with pytest.raises(ValueError, match="position 0 is out of range"):
        kvrouter.compute_block_hashes(bad, 4)


@pytest.mark.parametrize("bad", [[1.5] * 4, ["1"], [None], np.zeros((2, 2), int), np.zeros(4), "1234", 7, {1, 2}])
def test_what_is_no_token_sequence(bad):
    with pytest.raises(TypeError, match="must be a list or a one-dimensional integer array"):
        kvrouter.compute_block_hashes(bad, 4)


@pytest.mark.parametrize("block_size", [0, -1])
def test_block_size_below_one(block_size):
    with pytest.raises(ValueError, match="block_size must be at least 1"):
        kvrouter.compute_block_hashes([1, 2], block_size)


def test_extra_keys_separate_equal_tokens():
    tokens = list(range(8))
    plain = kvrouter.compute_block_hashes(tokens, 4).tolist()
    salted = kvrouter.compute_block_hashes(tokens, 4, extra_keys=[("salt",), None]).tolist()
    assert salted[0] != plain[0]
    assert salted[1] == plain[1]
    with_lora = kvrouter.compute_block_hashes(tokens, 4, lora_name="a", extra_keys=[("a",), None]).tolist()
    assert with_lora == kvrouter.compute_block_hashes(tokens, 4, lora_name="a").tolist()
    image = kvrouter.compute_block_hashes(tokens, 4, extra_keys=[(("img", 3),), (("img", -1),)]).tolist()
    assert len({*plain, *salted, *with_lora, *image}) == 7
    with pytest.raises(ValueError, match="one entry for each of the 2 full blocks"):
        kvrouter.compute_block_hashes(tokens, 4, extra_keys=[None])
    with pytest.raises(TypeError, match="extra_keys"):
        kvrouter.compute_block_hashes(tokens, 4, extra_keys=[(object(),), None])
