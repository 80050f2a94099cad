"""BatchedDataDict: a batch as a dictionary of columns, as NeMo-RL passes it around."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from typing_extensions import Self


class BatchedDataDict(UserDict[str, Any]):
    """Columns of one length: torch tensors or NumPy arrays (batch first), or lists.

    A subset of NeMo-RL's class of this name.  Nothing here needs torch; a batch of tensors stays one of tensors.
    """

    @property
    def size(self) -> int:
        """Rows of the batch; 0 without columns."""
        return len(next(iter(self.data.values()))) if self.data else 0

    @classmethod
    def from_batches(
        cls, batches: Sequence[Mapping[str, Any]], pad_value_dict: Mapping[str, float] | None = None
    ) -> Self:
        """The rows of all ``batches`` one after the other.

        2-D columns are right-padded to the widest with the column's entry of ``pad_value_dict`` (0 without one).
        Raises ValueError for batches with different columns.
        """
        if not batches:
            return cls()
        names = list(batches[0])
        for batch in batches:
            if set(batch) != set(names):
                raise ValueError(f"batches have different columns: {sorted(names)} and {sorted(batch)}")
        pads = pad_value_dict or {}
        return cls({name: _concatenate([batch[name] for batch in batches], pads.get(name, 0)) for name in names})

    def slice(self, start: int, end: int) -> Self:
        """Rows ``start`` to ``end`` - 1."""
        return type(self)({name: column[start:end] for name, column in self.data.items()})

    def select_indices(self, indices: Sequence[int]) -> Self:
        """The rows of these numbers, in this order."""
        rows = [int(index) for index in indices]
        return type(self)(
            {
                name: [column[row] for row in rows] if isinstance(column, list) else column[rows]
                for name, column in self.data.items()
            }
        )

    def repeat_interleave(self, num_repeats: int) -> Self:
        """Each row ``num_repeats`` times in a row: the samples of each prompt stand together."""
        return self.select_indices([row for row in range(self.size) for _ in range(num_repeats)])

    def shard_by_batch_size(self, shards: int) -> list[Self]:
        """``shards`` batches of equally many rows, in order.  Raises ValueError if the rows cannot be shared evenly."""
        if shards < 1 or self.size % shards:
            raise ValueError(f"{self.size} rows do not make {shards} shards of equal size")
        per_shard = self.size // shards
        return [self.slice(first, first + per_shard) for first in range(0, self.size, per_shard)]

    def get_batch(self, batch_idx: int, batch_size: int) -> Self:
        """Batch number ``batch_idx`` of those of ``batch_size`` rows; the last may be short."""
        return self.slice(batch_idx * batch_size, (batch_idx + 1) * batch_size)

    def rows(self) -> Iterator[Self]:
        """Each row as a batch of one."""
        for row in range(self.size):
            yield self.slice(row, row + 1)

    def to(self, device: Any) -> Self:
        """Tensors on ``device``; other columns as they are.  Changes this batch, as NeMo-RL does, and returns it."""
        for name, column in self.data.items():
            if is_tensor(column):
                self.data[name] = column.to(device)
        return self

    def get_dict(self) -> dict[str, Any]:
        """The columns as a plain dictionary."""
        return dict(self.data)


def is_tensor(value: Any) -> bool:
    """Whether this is a torch tensor; torch is not imported to find out."""
    return type(value).__module__.partition(".")[0] == "torch" and hasattr(value, "detach")


def to_numpy(value: Any) -> Any:
    """A tensor (of any device), array or sequence as a NumPy array; without a copy where possible."""
    return value.detach().cpu().numpy() if is_tensor(value) else np.asarray(value)


def like(array: Any, example: Any) -> Any:
    """The NumPy array ``array`` as a torch tensor if ``example`` is one, else as it is."""
    if not is_tensor(example):
        return array
    import torch

    return torch.from_numpy(array)


def _concatenate(columns: list[Any], pad_value: float) -> Any:
    first = columns[0]
    if isinstance(first, list):
        return [item for column in columns for item in column]
    arrays = [to_numpy(column) for column in columns]
    if arrays[0].ndim == 2:
        width = max(array.shape[1] for array in arrays)
        arrays = [np.pad(array, ((0, 0), (0, width - array.shape[1])), constant_values=pad_value) for array in arrays]
    return like(np.concatenate(arrays), first)
