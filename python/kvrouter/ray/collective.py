"""A process group for weights alone: the trainer is rank 0, the engines' ranks come after it.

It stands beside whatever default group a process has, as vLLM's workers have one already.  gloo on CPU, NCCL on GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = timedelta(minutes=10)


class WeightGroup:
    """One member of the group.

    host, port: where rank 0 listens while the group is made.
    device_type: "cpu" or "cuda".
    """

    def __init__(self, host: str, port: int, rank: int, world_size: int, device_type: str = "cpu") -> None:
        store = dist.TCPStore(host, port, world_size, is_master=rank == 0, timeout=TIMEOUT)
        prefixed = dist.PrefixStore("kvrouter-weights", store)
        self._store = store
        self._group: Any
        if device_type == "cuda":
            self._group = dist.ProcessGroupNCCL(prefixed, rank, world_size, TIMEOUT)
        else:
            self._group = dist.ProcessGroupGloo(prefixed, rank, world_size, TIMEOUT)

    def send(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Rank 0: broadcasts each tensor, in order."""
        for _, tensor in tensors:
            self._group.broadcast([tensor.detach().contiguous()], _from_rank_0()).wait()

    def receive(self, shape: Sequence[int], dtype: str, device: Any = "cpu") -> torch.Tensor:
        """The next tensor that rank 0 sends; ``dtype`` by name, e.g. "bfloat16"."""
        tensor = torch.empty(tuple(shape), dtype=getattr(torch, dtype.removeprefix("torch.")), device=device)
        self._group.broadcast([tensor], _from_rank_0()).wait()
        return tensor


def refit_info(state_dict: Iterable[tuple[str, torch.Tensor]]) -> dict[str, tuple[tuple[int, ...], str]]:
    """What ``prepare_refit_info`` takes: name to (shape, dtype), in the order in which ``send`` will send."""
    return {name: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for name, tensor in state_dict}


def _from_rank_0() -> Any:
    options = dist.BroadcastOptions()
    options.rootRank = 0
    options.rootTensor = 0
    return options
