from __future__ import annotations

import numpy as np
import pytest

from kvrouter.ray import BatchedDataDict
from kvrouter.ray.batched_data_dict import is_tensor, like, to_numpy


def batch() -> BatchedDataDict:
    return BatchedDataDict(
        {"ids": np.arange(12).reshape(4, 3), "length": np.asarray([1, 2, 3, 3]), "name": list("abcd")}
    )


def test_size_and_rows():
    assert batch().size == 4
    assert BatchedDataDict().size == 0
    rows = list(batch().rows())
    assert [row["name"] for row in rows] == [["a"], ["b"], ["c"], ["d"]]
    assert rows[2]["ids"].tolist() == [[6, 7, 8]]


def test_slices_and_batches():
    assert batch().slice(1, 3)["name"] == ["b", "c"]
    assert batch().get_batch(1, 3)["name"] == ["d"]
    assert [part["length"].tolist() for part in batch().shard_by_batch_size(2)] == [[1, 2], [3, 3]]
    with pytest.raises(ValueError, match="4 rows do not make 3 shards"):
        batch().shard_by_batch_size(3)


def test_samples_of_a_prompt_stand_together():
    repeated = batch().repeat_interleave(2)
    assert repeated["name"] == list("aabbccdd")
    assert repeated["ids"][:, 0].tolist() == [0, 0, 3, 3, 6, 6, 9, 9]


def test_select_indices():
    assert batch().select_indices(np.asarray([3, 0]))["name"] == ["d", "a"]


def test_from_batches_pads_to_the_widest():
    narrow = BatchedDataDict({"ids": np.asarray([[1, 2]]), "name": ["x"]})
    wide = BatchedDataDict({"ids": np.asarray([[3, 4, 5]]), "name": ["y"]})
    joined = BatchedDataDict.from_batches([narrow, wide], {"ids": 9})
    assert joined["ids"].tolist() == [[1, 2, 9], [3, 4, 5]]
    assert joined["name"] == ["x", "y"]
    assert BatchedDataDict.from_batches([]).size == 0
    with pytest.raises(ValueError, match="different columns"):
        BatchedDataDict.from_batches([narrow, BatchedDataDict({"ids": np.zeros((1, 2))})])


def test_tensors_stay_tensors():
    torch = pytest.importorskip("torch", reason="torch is not installed (it comes with vLLM)")
    data = BatchedDataDict({"ids": torch.arange(6).reshape(2, 3)})
    assert is_tensor(data["ids"])
    assert is_tensor(BatchedDataDict.from_batches([data, data])["ids"])
    assert to_numpy(data["ids"]).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert torch.equal(like(np.asarray([1.5]), data["ids"]), torch.tensor([1.5], dtype=torch.float64))
    assert data.to("cpu") is data


def test_arrays_are_no_tensors():
    assert not is_tensor(np.zeros(1))
    assert like(np.zeros(1), np.zeros(1)).dtype == np.float64
