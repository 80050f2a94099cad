"""A batch of prompts with their responses, as training sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass
class SequenceBatch:
    """B sequences, right-padded to width W.

    ids: [B, W] int64.
    lengths: [B], of prompt and response.
    mask: [B, W] bool, where the tokens of a response are.
    """

    ids: torch.Tensor
    lengths: torch.Tensor
    mask: torch.Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, start: int, stop: int) -> SequenceBatch:
        """Rows from ``start`` to before ``stop``, no wider than they need to be."""
        lengths = self.lengths[start:stop]
        width = int(lengths.max())
        return SequenceBatch(self.ids[start:stop, :width], lengths, self.mask[start:stop, :width])


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token lists to ids [B, W], right-padded, and lengths [B]."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.full((len(rows), int(lengths.max())), pad_id)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
    return ids, lengths
