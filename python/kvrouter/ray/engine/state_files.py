"""A state dict as a file that other processes of this node read."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_SHARED_MEMORY = Path("/dev/shm")


@contextmanager
def state_dict_file(state_dict: Mapping[str, Any]) -> Iterator[str]:
    """Path of a safetensors file with these tensors, in shared memory where there is some; removed at the end."""
    import torch
    from safetensors.torch import save_file

    tensors = {
        name: (value.detach().cpu() if isinstance(value, torch.Tensor) else torch.as_tensor(value)).contiguous()
        for name, value in state_dict.items()
    }
    folder = _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else None
    handle, path = tempfile.mkstemp(prefix="kvrouter-weights-", suffix=".safetensors", dir=folder)
    os.close(handle)
    try:
        # Tied parameters share memory, which the format refuses: each gets its own.
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
        yield path
    finally:
        Path(path).unlink(missing_ok=True)
