"""The KV-event settings of a vLLM worker that a router listens to."""

from __future__ import annotations

from typing import Any

from kvrouter.config import REPLAY_PORT_OFFSET
from kvrouter.vllm.ports import check_port

_WILDCARDS = {"*": "*", "0.0.0.0": "*", "::": "[::]", "[::]": "[::]"}


def kv_events_config(
    worker: int,
    base_kv_events_port: int = 5557,
    *,
    host: str = "*",
    replay: bool = True,
    base_replay_port: int | None = None,
    topic: str = "kv",
) -> dict[str, Any]:
    """Settings under which worker ``worker`` publishes its KV events.

    As JSON it is the value of vLLM's ``--kv-events-config``; for an engine in process it is
    ``KVEventsConfig(**kv_events_config(worker))``.  A data-parallel rank r inside the worker publishes on these ports
    plus r: vLLM adds it.

    Parameters
    ----------
    worker
        Index of the worker, from 0; its ports are the base ports plus this.
    base_kv_events_port
        Port of worker 0, the router's ``base_kv_events_port``.
    host
        Address to bind: ``*`` (every IPv4 interface) or ``::`` (IPv6 too).  vLLM connects to any other
        address instead of binding it, so no other is accepted.
    replay
        Whether the worker keeps its last batches for a router that missed some.
    base_replay_port
        Replay port of worker 0; ``base_kv_events_port + 200`` when None.
    topic
        Topic of the messages.

    Raises
    ------
    ValueError
        For a negative worker, a port out of range, replay on the events port, or a host that vLLM would connect to;
        the message names the setting.
    """
    if worker < 0:
        raise ValueError(f"worker must not be negative, not {worker}")
    address = _WILDCARDS.get(host)
    if address is None:
        raise ValueError(
            f"host must be '*' or '::', not {host!r}: vLLM binds its KV-event socket only for a wildcard address, "
            "and connects to any other"
        )
    port = check_port(base_kv_events_port, "base_kv_events_port", worker)
    config: dict[str, Any] = {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": f"tcp://{address}:{port}",
        "topic": topic,
    }
    if replay:
        if base_replay_port is None:
            replay_port = check_port(
                base_kv_events_port + REPLAY_PORT_OFFSET,
                f"base_replay_port (by default base_kv_events_port + {REPLAY_PORT_OFFSET})",
                worker,
            )
        else:
            replay_port = check_port(base_replay_port, "base_replay_port", worker)
        if replay_port == port:
            raise ValueError(f"base_replay_port gives worker {worker} port {port}, which is its KV-events port")
        config["replay_endpoint"] = f"tcp://{address}:{replay_port}"
    return config
