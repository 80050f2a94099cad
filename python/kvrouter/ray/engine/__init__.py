"""What runs inside a generation worker: a real vLLM engine, or the simulated one, behind one interface."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvrouter.ray.engine.base import (
    Engine,
    EngineDeadError,
    EngineSpec,
    RoutingNote,
    SampleRequest,
    SampleResult,
    WeightSource,
)

if TYPE_CHECKING:
    from kvrouter.ray.engine.base import EnginePorts

__all__ = [
    "Engine",
    "EngineDeadError",
    "EngineSpec",
    "RoutingNote",
    "SampleRequest",
    "SampleResult",
    "WeightSource",
    "make_engine",
]


def make_engine(spec: EngineSpec, ports: EnginePorts) -> Engine:
    """The engine of this kind, not started yet."""
    if spec.config.get("engine", "vllm") == "sim":
        from kvrouter.ray.engine.sim_engine import SimulatedEngine

        return SimulatedEngine(spec, ports)
    from kvrouter.ray.engine.vllm_engine import VllmEngine

    return VllmEngine(spec, ports)
