"""From a batch to one request a sample, and from the results back to a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvrouter.ray.batched_data_dict import BatchedDataDict, like, to_numpy
from kvrouter.ray.engine.base import SampleRequest, SampleResult


def requests_of_batch(data: Mapping[str, Any], greedy: bool = False) -> list[SampleRequest]:
    """One request a row: its tokens without the padding.

    data: ``input_ids`` [B, S] integers, right-padded; ``input_lengths`` [B]; optionally ``stop_strings`` (a list of
        one list, or None, a row), ``max_new_tokens`` [B], ``seeds`` [B], and ``decided_at`` [B]: seconds since the
        epoch, when each row's worker was decided.
    Raises ValueError, naming the column, for columns that do not fit together.
    """
    for name in ("input_ids", "input_lengths"):
        if name not in data:
            raise ValueError(f"the batch lacks {name}")
    ids = to_numpy(data["input_ids"])
    lengths = to_numpy(data["input_lengths"])
    if ids.ndim != 2 or ids.dtype.kind not in "iu":
        raise ValueError(f"input_ids must be integers of shape [B, S], not {ids.dtype} {list(ids.shape)}")
    if lengths.shape != (len(ids),) or lengths.dtype.kind not in "iu":
        raise ValueError(
            f"input_lengths must be integers of shape [{len(ids)}], not {lengths.dtype} {list(lengths.shape)}"
        )
    wrong = np.flatnonzero((lengths < 1) | (lengths > ids.shape[1]))
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(f"input_lengths[{row}] is {int(lengths[row])}, not from 1 to {ids.shape[1]}")
    optional = {
        name: _column(data, name, len(ids)) for name in ("stop_strings", "max_new_tokens", "seeds", "decided_at")
    }
    return [
        SampleRequest(
            np.ascontiguousarray(ids[row, : int(lengths[row])], dtype=np.int64),
            greedy,
            None if optional["max_new_tokens"] is None else int(optional["max_new_tokens"][row]),
            tuple((optional["stop_strings"] or {row: None})[row] or ()),
            None if optional["seeds"] is None else int(optional["seeds"][row]),
            decided_at=0.0 if optional["decided_at"] is None else float(optional["decided_at"][row]),
        )
        for row in range(len(ids))
    ]


def batch_of_results(data: Mapping[str, Any], results: Sequence[SampleResult], pad_token_id: int) -> BatchedDataDict:
    """The batch that ``generate`` returns; see ``VllmGeneration.generate`` for its columns.

    Tensors if ``input_ids`` is one, else NumPy arrays.
    """
    ids = to_numpy(data["input_ids"])
    lengths = to_numpy(data["input_lengths"]).astype(np.int64)
    generated = np.asarray([len(result.tokens) for result in results], dtype=np.int64)
    total = lengths + generated
    width = max(int(ids.shape[1]), int(total.max(initial=0)))
    output_ids: npt.NDArray[np.int64] = np.full((len(ids), width), pad_token_id, dtype=np.int64)
    logprobs: npt.NDArray[np.float32] = np.zeros((len(ids), width), dtype=np.float32)
    for row, result in enumerate(results):
        begin, end = int(lengths[row]), int(total[row])
        output_ids[row, :begin] = ids[row, :begin]
        output_ids[row, begin:end] = result.tokens
        logprobs[row, begin : begin + len(result.logprobs)] = result.logprobs
    columns = {
        "output_ids": output_ids,
        "logprobs": logprobs,
        "generation_lengths": generated,
        "unpadded_sequence_lengths": total,
        "truncated": np.asarray([result.truncated for result in results], dtype=bool),
        "num_cached_tokens": np.asarray([result.cached_tokens for result in results], dtype=np.int64),
        "weight_version": np.asarray([result.weight_version for result in results], dtype=np.int64),
        "transit_s": np.asarray([result.transit_s for result in results], dtype=np.float64),
        "ttft_s": np.asarray([result.ttft_s for result in results], dtype=np.float64),
        "generation_s": np.asarray([result.duration_s for result in results], dtype=np.float64),
    }
    return BatchedDataDict({name: like(column, data["input_ids"]) for name, column in columns.items()})


def _column(data: Mapping[str, Any], name: str, rows: int) -> Any:
    column = data.get(name)
    if column is None:
        return None
    if len(column) != rows:
        raise ValueError(f"{name} has {len(column)} entries for {rows} rows")
    return column if isinstance(column, list) else to_numpy(column)
