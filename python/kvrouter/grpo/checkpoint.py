"""Checkpoints: one folder a step, complete or not there."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch

_NAME = re.compile(r"step_(\d+)")
_STATE = "state.pt"


def save_checkpoint(folder: str | Path, step: int, state: dict[str, Any], keep: int | None) -> Path:
    """Writes ``state`` as that of ``step``; then removes all but the newest ``keep`` (None: none).

    The folder gets its name when it is complete, so that an interruption leaves the one before.
    """
    final = Path(folder) / f"step_{step}"
    under_way = Path(folder) / f".step_{step}.part"
    shutil.rmtree(under_way, ignore_errors=True)
    under_way.mkdir(parents=True)
    torch.save({"step": step, **state}, under_way / _STATE)
    shutil.rmtree(final, ignore_errors=True)
    under_way.rename(final)
    if keep is not None:
        for _, old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    return final


def checkpoints(folder: str | Path) -> list[tuple[int, Path]]:
    """The checkpoints in a folder with their steps, oldest first."""
    if not Path(folder).is_dir():
        return []
    found = [(match, path) for path in Path(folder).iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted((int(match[1]), path) for match, path in found)


def load_newest(folder: str | Path) -> dict[str, Any] | None:
    """The state of the newest checkpoint; None when there is none.  Raises ValueError for one that cannot be read."""
    found = checkpoints(folder)
    if not found:
        return None
    path = found[-1][1] / _STATE
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and pickle have many
        raise ValueError(
            f"the checkpoint {path} cannot be read ({error}): remove its folder, or set checkpointing.checkpoint_dir"
        ) from None
    return state
