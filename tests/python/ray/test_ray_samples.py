from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrouter.ray.engine.base import SampleResult
from kvrouter.ray.samples import batch_of_results, requests_of_batch


def result(tokens: list[int], **more) -> SampleResult:
    logprobs = np.asarray([-0.5] * len(tokens), dtype=np.float32)
    return SampleResult(
        np.asarray(tokens, dtype=np.int64), logprobs, more.pop("truncated", True), **{"cached_tokens": 0, **more}
    )


def test_a_request_is_its_row_without_the_padding():
    data = {
        "input_ids": np.asarray([[5, 6, 0, 0], [7, 8, 9, 0]]),
        "input_lengths": np.asarray([2, 3]),
        "stop_strings": [None, ["end"]],
        "max_new_tokens": np.asarray([1, 2]),
        "seeds": [11, 12],
    }
    first, second = requests_of_batch(data, greedy=True)
    assert first.tokens.tolist() == [5, 6]
    assert second.tokens.tolist() == [7, 8, 9]
    assert (first.stop_strings, second.stop_strings) == ((), ("end",))
    assert (first.max_new_tokens, second.seed, first.greedy) == (1, 12, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": None}, "input_ids"),
        ({"input_ids": np.zeros(4, int)}, r"input_ids must be integers of shape \[B, S\]"),
        ({"input_ids": np.zeros((2, 4))}, "input_ids must be integers"),
        ({"input_lengths": np.asarray([1])}, r"input_lengths must be integers of shape \[2\]"),
        ({"input_lengths": np.asarray([1, 5])}, r"input_lengths\[1\] is 5, not from 1 to 4"),
        ({"input_lengths": np.asarray([0, 4])}, r"input_lengths\[0\] is 0"),
        ({"seeds": [1]}, "seeds has 1 entries for 2 rows"),
    ],
)
def test_columns_that_do_not_fit(change, message):
    data = {"input_ids": np.zeros((2, 4), int), "input_lengths": np.asarray([1, 4])} | change
    with pytest.raises(ValueError, match=message):
        requests_of_batch({name: column for name, column in data.items() if column is not None})


def test_a_batch_of_results():
    data = {"input_ids": np.asarray([[5, 6, 0], [7, 8, 9]]), "input_lengths": np.asarray([2, 3])}
    batch = batch_of_results(data, [result([1, 2, 3]), result([4], cached_tokens=2, truncated=False)], pad_token_id=99)
    assert batch["output_ids"].tolist() == [[5, 6, 1, 2, 3], [7, 8, 9, 4, 99]]
    assert batch["logprobs"].tolist() == [[0, 0, -0.5, -0.5, -0.5], [0, 0, 0, -0.5, 0]]
    assert batch["generation_lengths"].tolist() == [3, 1]
    assert batch["unpadded_sequence_lengths"].tolist() == [5, 4]
    assert batch["truncated"].tolist() == [True, False]
    assert batch["num_cached_tokens"].tolist() == [0, 2]
    assert batch["output_ids"].dtype == np.int64
    assert batch["logprobs"].dtype == np.float32


@given(st.lists(st.tuples(st.integers(1, 7), st.integers(0, 5)), min_size=1, max_size=6))
def test_prompt_and_response_are_whole_whatever_the_lengths(rows):
    ids = np.arange(1, 1 + 7 * len(rows)).reshape(len(rows), 7)
    lengths = np.asarray([prompt for prompt, _ in rows])
    results = [result(list(range(1000, 1000 + generated))) for _, generated in rows]
    batch = batch_of_results({"input_ids": ids, "input_lengths": lengths}, results, pad_token_id=0)
    for row, (prompt, generated) in enumerate(rows):
        expected = [*ids[row, :prompt].tolist(), *range(1000, 1000 + generated)]
        assert batch["output_ids"][row, : prompt + generated].tolist() == expected
        assert not batch["output_ids"][row, prompt + generated :].any()
    assert batch["output_ids"].shape == batch["logprobs"].shape
