"""Experiment trackers that NeMo-RL's logger imports, and no test uses: empty modules where they are not installed."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

NAMES = ("mlflow", "swanlab")


def install() -> None:
    """Called before NeMo-RL is imported."""
    for name in NAMES:
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            sys.modules[name] = ModuleType(name)
