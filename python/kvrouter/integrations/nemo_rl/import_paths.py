"""The guide's import paths, where NeMo-RL has nothing of its own there.

The guide has ``nemo_rl.models.generation.dynamo.standalone_router.KvRouter`` and so on.  NeMo-RL's main branch uses
that package for another backend, which is left alone: there, import from ``kvrouter`` and ``kvrouter.ray``.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

PACKAGE = "nemo_rl.models.generation.dynamo"
_PARENT, _, _CHILD = PACKAGE.rpartition(".")

#: Module -> its names, and where they are here.
NAMES = {
    PACKAGE: {
        "KvRouter": "kvrouter",
        "RouterAPI": "kvrouter.api",
        "RoutedVllmWorkerGroup": "kvrouter.ray",
        "RouterConfig": "kvrouter",
    },
    f"{PACKAGE}.standalone_router": {"KvRouter": "kvrouter", "RouterAPI": "kvrouter.api"},
    f"{PACKAGE}.routed_worker_group": {"RoutedVllmWorkerGroup": "kvrouter.ray", "RouterConfig": "kvrouter"},
}


def install() -> bool:
    """Makes the paths resolve to this package's names; False, with nothing done, where NeMo-RL has them itself."""
    if PACKAGE in sys.modules or importlib.util.find_spec(PACKAGE) is not None:
        return False
    for path, names in NAMES.items():
        module = ModuleType(path, __doc__)
        module.__path__ = []  # a package, whose modules are all here
        module.__dict__.update(
            {name: getattr(importlib.import_module(source), name) for name, source in names.items()},
            __kvrouter__=True,
        )
        sys.modules[path] = module
        parent, _, child = path.rpartition(".")
        setattr(importlib.import_module(parent), child, module)
    return True


def remove() -> None:
    """Undoes ``install``."""
    ours = [path for path in NAMES if hasattr(sys.modules.get(path), "__kvrouter__")]
    for path in ours:
        del sys.modules[path]
    if ours:
        delattr(importlib.import_module(_PARENT), _CHILD)
