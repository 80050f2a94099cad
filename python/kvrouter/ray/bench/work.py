"""What the Ray benchmark sends: the batches of all iterations, the same for every mode and routing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvrouter.bench.workloads import Thrash, Unique
from kvrouter.ray.batched_data_dict import BatchedDataDict
from kvrouter.ray.bench.settings import RayBenchSettings


@dataclass(frozen=True)
class Batch:
    """One iteration.

    data: ``input_ids`` [B, S] int64 and ``input_lengths`` [B], NumPy arrays.
    prefix_ids: which prefix (or prompt) each sample shares, (B,).
    first_index: number of its first sample in the run.
    """

    data: BatchedDataDict
    prefix_ids: npt.NDArray[np.int64]
    first_index: int

    def rows(self) -> Iterator[Batch]:
        """Each sample as a batch of one."""
        for row, data in enumerate(self.data.rows()):
            yield Batch(data, self.prefix_ids[row : row + 1], self.first_index + row)


def make_batches(settings: RayBenchSettings) -> list[Batch]:
    """The batches of all iterations, those of the warm-up first.

    Prompts stand ``num_generations_per_prompt`` times side by side; a prompt is a prefix and a tail of its own, and
    every round over the prefixes has an order of its own (see ``kvrouter.bench.workloads``).
    """
    iterations = settings.warmup_iterations + settings.num_iterations
    prompts_per_batch = settings.batch_size // settings.num_generations_per_prompt
    common: dict[str, Any] = {
        "num_requests": iterations * prompts_per_batch,
        "prompt_len": settings.seq_len,
        "max_tokens": settings.generation_max_tokens,
        "vocab_size": settings.vocab_size,
        "seed": settings.seed,
    }
    requests = (
        Thrash(**common, num_prefixes=settings.prefixes, prefix_len=settings.shared_len).requests()
        if settings.prefixes
        else Unique(**common).requests()
    )
    rng = np.random.default_rng([settings.seed, 1])
    batches = []
    for iteration in range(iterations):
        prompts = requests[iteration * prompts_per_batch : (iteration + 1) * prompts_per_batch]
        rows = np.repeat(np.arange(prompts_per_batch), settings.num_generations_per_prompt)
        if settings.shuffle:
            rng.shuffle(rows)
        ids = np.stack([prompts[row].tokens for row in rows]).astype(np.int64)
        data = BatchedDataDict({"input_ids": ids, "input_lengths": np.full(len(rows), settings.seq_len)})
        prefix_ids = np.asarray([prompts[row].prefix_id for row in rows])
        batches.append(Batch(data, prefix_ids, iteration * settings.batch_size))
    return batches
