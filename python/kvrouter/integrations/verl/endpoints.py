"""What a verl server says of its engine: where it publishes KV events, and how large its blocks are."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray

from kvrouter.integrations.fleet import Endpoints

logger = logging.getLogger("kvrouter")
_DESCRIBE_TIMEOUT_S = 30.0
_HOST_AND_PORT = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^\s:/\[\]]+):\d{1,5}")


@dataclass(frozen=True)
class ServerEngine:
    """What a server's engine told.

    endpoints: where to listen; empty for an engine that publishes nothing.
    block_size: tokens a KV block; None: not told.
    """

    endpoints: Endpoints = field(default_factory=Endpoints)
    block_size: int | None = None


def describe_engine(server: Any) -> dict[str, Any]:
    """Runs inside a server's actor: what its ``AsyncLLM`` says of itself, in plain values."""
    engine = getattr(server, "engine", None)
    sources: dict[int, Any] = getattr(engine, "get_kv_event_sources", dict)()
    cache = getattr(getattr(engine, "vllm_config", None), "cache_config", None)
    return {
        "kv_events": {int(rank): (source.endpoint, source.replay_endpoint) for rank, source in sources.items()},
        "block_size": getattr(cache, "block_size", None),
        "metrics": bool(getattr(engine, "log_stats", False)),
    }


def describe_servers(servers: Mapping[str, Any]) -> dict[str, ServerEngine]:
    """Asks each server's actor (by its handle) what its engine publishes.

    A server that does not answer, or has no handle, is routed to by what the router sends there itself.
    """
    asked = {name: _ask(handle) for name, handle in servers.items()}
    return {name: _answer(name, asked[name]) for name in servers}


def _ask(handle: Any) -> Any:
    call = getattr(handle, "__ray_call__", None)  # of every actor
    return None if call is None else call.remote(describe_engine)


def _answer(name: str, pending: Any) -> ServerEngine:
    if pending is None:
        return ServerEngine()
    try:
        return read_description(name, ray.get(pending, timeout=_DESCRIBE_TIMEOUT_S))
    except Exception as error:
        logger.warning("server %s did not say where it publishes KV events, and is routed to without: %s", name, error)
        return ServerEngine()


def read_description(name: str, told: Mapping[str, Any]) -> ServerEngine:
    """Endpoints from what ``describe_engine`` returned of the server ``name`` (``host:port``)."""
    match = _HOST_AND_PORT.fullmatch(name)
    host = match[1] if match else "127.0.0.1"
    block_size = told["block_size"]
    http = f"http://{name}" if match and told["metrics"] else ""
    sources = told["kv_events"]
    if len(sources) > 1:
        logger.warning(
            "server %s has %d data-parallel engines, between which verl lets nobody choose: its KV events are not used",
            name,
            len(sources),
        )
        return ServerEngine(Endpoints(http=http), block_size)
    kv_events = replay = ""
    for endpoint, replay_endpoint in sources.values():
        kv_events = reachable(endpoint, host)
        replay = reachable(replay_endpoint or "", host)
    if not kv_events:
        logger.warning(
            "server %s publishes no KV events: set actor_rollout_ref.rollout.engine_kwargs.vllm.kv_events_config", name
        )
    return ServerEngine(Endpoints(kv_events=kv_events, replay=replay, http=http), block_size)


def reachable(endpoint: str, host: str) -> str:
    """The endpoint with the host in place of a wildcard; '' for one whose port only the operating system knows."""
    endpoint = re.sub(r"^tcp://(\*|0\.0\.0\.0|\[::\]):", f"tcp://{host}:", endpoint)
    return "" if endpoint.endswith(":0") else endpoint
