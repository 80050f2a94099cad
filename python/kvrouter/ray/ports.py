"""The ports that a worker's engine publishes on."""

from __future__ import annotations

from dataclasses import dataclass

from kvrouter.config import REPLAY_PORT_OFFSET
from kvrouter.ray.engine.base import EnginePorts
from kvrouter.vllm.ports import PortRange, PortTakenError, find_free_ports, reserve_ports

_ATTEMPTS = 200
_HIGHEST_PORT = 65535


@dataclass
class PortClaim:
    """Ports held for one engine until ``release``: others that look for free ports pass them by."""

    ports: EnginePorts
    held: list[PortRange]

    def release(self) -> None:
        """Gives the ports up."""
        for ports in self.held:
            ports.release()


def claim_ports(kv_events_port: int, load_offset: int, prefer_base: bool = True) -> PortClaim:
    """Ports for KV events, load and replay.

    kv_events_port: wanted for the KV events (base + rank); another, free one where it, or the load port that belongs
        to it, is taken.
    load_offset: the load port lies this far above the one for KV events, as a router assumes.
    Raises RuntimeError when there are no such ports.
    """
    if prefer_base:
        claim = _claim(kv_events_port, load_offset)
        if claim is not None:
            return claim
    for _ in range(_ATTEMPTS):
        with_free = find_free_ports(1)
        candidate = with_free[0]
        with_free.release()
        claim = _claim(candidate, load_offset)
        if claim is not None:
            return claim
    raise RuntimeError(
        f"found no two free ports {load_offset} apart: set base_kv_events_port and base_metrics_port closer together"
    )


def _claim(kv_events_port: int, load_offset: int) -> PortClaim | None:
    load_port = kv_events_port + load_offset
    if not 1 <= load_port <= _HIGHEST_PORT:
        return None
    held: list[PortRange] = []
    try:
        held.append(reserve_ports(kv_events_port, 1, "base_kv_events_port"))
        held.append(reserve_ports(load_port, 1, "base_metrics_port"))
    except PortTakenError:
        for ports in held:
            ports.release()
        return None
    # The replay port is nobody's business but the engine's: it is reported.
    try:
        held.append(reserve_ports(kv_events_port + REPLAY_PORT_OFFSET, 1, "replay port"))
    except (PortTakenError, ValueError):
        held.append(find_free_ports(1))
    return PortClaim(EnginePorts(kv_events_port, held[2][0], load_port), held)
