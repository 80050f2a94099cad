"""What NeMo-RL finds in its own environment and not in this one; install() comes before any import of it.

- Experiment trackers that its logger imports, and no test uses: empty modules where they are not installed.
- Python 3.13, which it asks for: before 3.12 pydantic takes TypedDict from typing_extensions only.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import typing
from importlib.machinery import ModuleSpec

import typing_extensions

TRACKERS = ("mlflow", "swanlab")


def install() -> None:
    """Makes up for it in this process."""
    os.environ["NEMO_RL_PY_EXECUTABLES_SYSTEM"] = "1"  # its actors run in this environment, not in some that uv builds
    os.environ["NO_VCS_VERSION"] = "1"
    for name in TRACKERS:
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            # With a spec: others ask find_spec() whether it is there.
            sys.modules[name] = importlib.util.module_from_spec(ModuleSpec(name, loader=None))
    if sys.version_info < (3, 12):
        typing.TypedDict = typing_extensions.TypedDict
