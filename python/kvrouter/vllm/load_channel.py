"""A worker's load on a ZeroMQ PUB socket: the newest state after each change, and once a second.

It knows nothing of vLLM, so that any engine can publish with it.
"""

from __future__ import annotations

import json
import logging
import math
import re
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

ENDPOINT_VARIABLE = "KVROUTER_LOAD_ENDPOINT"
BASE_PORT_VARIABLE = "KVROUTER_BASE_METRICS_PORT"
WORKER_VARIABLE = "KVROUTER_WORKER_ID"

HEARTBEAT_S = 1.0

_TCP_ENDPOINT = re.compile(r"tcp://(?P<host>\*|\[[0-9A-Fa-f:.%]+\]|[^\s:/\[\]]+):(?P<port>\d{1,5})")


@dataclass(frozen=True)
class LoadSettings:
    """Where load is to be published, and which environment variable said so."""

    endpoint: str
    setting: str


def load_settings(environ: Mapping[str, str], dp_rank: int = 0) -> LoadSettings | None:
    """Reads where to publish from the environment; None when nothing asks for it.

    ``KVROUTER_LOAD_ENDPOINT=tcp://*:5657`` (or ``ipc://path``) names the endpoint;
    ``KVROUTER_BASE_METRICS_PORT=5657`` with ``KVROUTER_WORKER_ID=2`` (0 when unset) stands for ``tcp://*:5659``.
    ``dp_rank``, the engine's data-parallel rank, is added to the port.  Empty variables count as unset.

    Raises
    ------
    ValueError
        For a value that cannot be used; the message names the variable.
    """
    endpoint = environ.get(ENDPOINT_VARIABLE, "").strip()
    if endpoint:
        return endpoint_settings(endpoint, ENDPOINT_VARIABLE, dp_rank)
    base = environ.get(BASE_PORT_VARIABLE, "").strip()
    worker = environ.get(WORKER_VARIABLE, "").strip()
    if not base:
        if worker:
            raise ValueError(f"{WORKER_VARIABLE} is set but {BASE_PORT_VARIABLE} is not: set it to publish load")
        return None
    total = _whole(base, BASE_PORT_VARIABLE) + (_whole(worker, WORKER_VARIABLE) if worker else 0) + dp_rank
    port = _port(total, f"{BASE_PORT_VARIABLE}={base} with {WORKER_VARIABLE}={worker or 0} and rank {dp_rank}")
    return LoadSettings(f"tcp://*:{port}", BASE_PORT_VARIABLE)


def endpoint_settings(endpoint: str, setting: str, dp_rank: int = 0) -> LoadSettings:
    """Settings for an endpoint that ``setting`` gave, its port raised by ``dp_rank``; ``ValueError`` if it is none."""
    if endpoint.startswith("ipc://") and len(endpoint) > len("ipc://"):
        return LoadSettings(f"{endpoint}_dp{dp_rank}" if dp_rank else endpoint, setting)
    match = _TCP_ENDPOINT.fullmatch(endpoint)
    if not match:
        raise ValueError(f"{setting}={endpoint!r} is not an endpoint such as tcp://*:5657")
    port = _port(int(match["port"]) + dp_rank, f"{setting}={endpoint!r}")
    return LoadSettings(f"tcp://{match['host']}:{port}", setting)


def _whole(text: str, variable: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ValueError(f"{variable}={text!r} is not a whole number")
    return int(text)


def _port(port: int, source: str) -> int:
    if not 1 <= port <= 65535:
        raise ValueError(f"{source} gives port {port}, which is not between 1 and 65535")
    return port


class LoadChannel:
    """Publishes one worker's load.

    ``publish`` stores a tuple and wakes a thread; that thread alone owns the socket.  States that come faster than
    the thread sends are skipped: the newest counts.  A port that is taken is warned about once and tried again every
    second, so that a worker that is restarted at once still gets its port.

    Parameters
    ----------
    endpoint
        Endpoint to bind, e.g. ``tcp://*:5657``.
    setting
        Name of the setting that gave the endpoint, for messages.
    heartbeat_s
        Seconds between messages when nothing changes.
    """

    def __init__(self, endpoint: str, setting: str = ENDPOINT_VARIABLE, heartbeat_s: float = HEARTBEAT_S) -> None:
        self.endpoint = endpoint
        # The thread holds this, never the channel: a channel that nobody refers to any more closes its socket.
        self._shared = _Shared(endpoint, setting, heartbeat_s)
        self._thread = threading.Thread(
            target=_publish_until_stopped, args=(self._shared,), name="kvrouter-load", daemon=True
        )
        self._thread.start()
        self._finalizer = weakref.finalize(self, _stop, self._shared, self._thread)

    def publish(self, kv_cache_usage: float, num_waiting_reqs: int, num_running_reqs: int) -> None:
        """Makes this the state to send: usage from 0 to 1, and two counts of requests."""
        shared = self._shared
        shared.state = (kv_cache_usage, num_waiting_reqs, num_running_reqs)
        if not shared.wake.is_set():
            shared.wake.set()

    def close(self) -> None:
        """Stops the thread and frees the port; calling it again does nothing."""
        self._finalizer()


class _Shared:
    """What the publishing thread shares with those who record."""

    def __init__(self, endpoint: str, setting: str, heartbeat_s: float) -> None:
        self.endpoint = endpoint
        self.setting = setting
        self.heartbeat_s = heartbeat_s
        self.state: tuple[float, int, int] = (0.0, 0, 0)
        self.wake = threading.Event()
        self.stopped = False


def _stop(shared: _Shared, thread: threading.Thread) -> None:
    shared.stopped = True
    shared.wake.set()
    if thread is not threading.current_thread():
        thread.join(timeout=2.0)


def _encode(state: tuple[float, int, int]) -> bytes | None:
    usage, waiting, running = state
    if not math.isfinite(usage):
        return None
    message = {
        "kv_cache_usage": min(1.0, max(0.0, usage)),
        "num_waiting_reqs": max(0, waiting),
        "num_running_reqs": max(0, running),
    }
    return json.dumps(message).encode()


def _publish_until_stopped(shared: _Shared) -> None:
    try:
        import zmq
    except ImportError:
        logger.warning("load is not published, although %s asks for it: install pyzmq", shared.setting)
        return
    context = zmq.Context()
    try:
        socket = _bind(shared, context)
        while socket is not None and not shared.stopped:
            # Cleared before the state is read: a state that comes between the two wakes the next round.
            shared.wake.clear()
            message = _encode(shared.state)
            if message is not None:
                try:
                    socket.send(message, zmq.NOBLOCK)
                except zmq.Again:
                    logger.debug("load message skipped: the socket is busy")
            shared.wake.wait(shared.heartbeat_s)
        if socket is not None:
            socket.close(linger=0)
    except Exception as error:
        logger.warning("load is no longer published at %s (%s): %s", shared.endpoint, shared.setting, error)
    finally:
        context.destroy(linger=0)


def _bind(shared: _Shared, context: Any) -> Any:
    """The bound socket; None when the channel is stopped or the endpoint can never be bound."""
    import zmq

    warned = False
    while not shared.stopped:
        socket = context.socket(zmq.PUB)
        socket.linger = 0
        # A subscriber that stopped reading must not be sent minutes of old states when it goes on.
        socket.sndhwm = 16
        if "[" in shared.endpoint:
            socket.ipv6 = True
        try:
            socket.bind(shared.endpoint)
        except zmq.ZMQError as error:
            socket.close()
            if error.errno != zmq.EADDRINUSE:
                logger.warning("load is not published: cannot bind %s (%s): %s", shared.endpoint, shared.setting, error)
                return None
            if not warned:
                warned = True
                logger.warning(
                    "load is not published: port %s is taken (%s gives %s); trying again every second",
                    shared.endpoint.rpartition(":")[2],
                    shared.setting,
                    shared.endpoint,
                )
            shared.wake.clear()
            shared.wake.wait(1.0)
            continue
        logger.log(logging.WARNING if warned else logging.DEBUG, "load is published at %s", shared.endpoint)
        return socket
    return None
