"""The worker side: what a vLLM worker needs so that a router knows its cache and its load.

Nothing here imports vLLM before it is used, and only ``load_publisher`` imports it at all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvrouter.vllm.kv_events import kv_events_config
    from kvrouter.vllm.launcher import LaunchError, Worker, WorkerFleet, launch_workers
    from kvrouter.vllm.load_publisher import LoadPublisher
    from kvrouter.vllm.ports import PortTakenError
    from kvrouter.vllm.tiny_model import TinyModel, make_tiny_model

__all__ = [
    "LaunchError",
    "LoadPublisher",
    "PortTakenError",
    "TinyModel",
    "Worker",
    "WorkerFleet",
    "kv_events_config",
    "launch_workers",
    "make_tiny_model",
]

_MODULES = {
    "LaunchError": "launcher",
    "LoadPublisher": "load_publisher",
    "PortTakenError": "ports",
    "TinyModel": "tiny_model",
    "Worker": "launcher",
    "WorkerFleet": "launcher",
    "kv_events_config": "kv_events",
    "launch_workers": "launcher",
    "make_tiny_model": "tiny_model",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
