"""GRPO training (Shao et al. 2024, arXiv:2402.03300) with rollouts from router-fed engines; see docs/grpo.md."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvrouter.grpo.config import config_from, load_config
from kvrouter.grpo.schema import MasterConfig

if TYPE_CHECKING:
    from kvrouter.grpo.async_trainer import async_grpo_train
    from kvrouter.grpo.sync_trainer import grpo_train
    from kvrouter.grpo.training import Training, setup

__all__ = ["MasterConfig", "Training", "async_grpo_train", "config_from", "grpo_train", "load_config", "setup"]


def __getattr__(name: str) -> Any:
    """What needs torch and Ray is imported when it is first asked for: configs can be read without."""
    if name in ("Training", "setup"):
        from kvrouter.grpo import training

        return getattr(training, name)
    if name == "async_grpo_train":
        from kvrouter.grpo.async_trainer import async_grpo_train

        return async_grpo_train
    if name == "grpo_train":
        from kvrouter.grpo.sync_trainer import grpo_train

        return grpo_train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
