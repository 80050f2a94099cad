"""The router's configuration, and where its workers are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

from typing_extensions import NotRequired

DEFAULT_BLOCK_SIZE = 64
DEFAULT_KV_EVENTS_PORT = 5557
DEFAULT_METRICS_PORT = 5657
REPLAY_PORT_OFFSET = 200
"""Where the replay port lies above the events port unless it is given."""
_MAX_PORT = 65535


class RouterConfig(TypedDict):
    """Configuration for KV-aware dynamic routing, as it stands in a config file.

    enabled: use the router at all.
    block_size: KV-cache block size in tokens; must be the workers' own.
    base_kv_events_port, base_metrics_port: worker N publishes KV events and load on base + N.
    mode: "best_worker" (default) or "round_robin".
    policy: how "best" is decided (``kvrouter.policy_names()``); default "linear".
    worker_addresses: a host for each worker; default localhost for all.
    worker_ports: the KV-event port of each worker; its load port is as far from it as the two base ports are.
    index_memory_limit: bytes that the prefix index may take, at least 1 MiB; default 0, no limit.
    replay: lost KV events are asked for again, at each worker's KV-event port + 200; default False.
    """

    enabled: bool
    block_size: int
    base_kv_events_port: int
    base_metrics_port: int
    mode: NotRequired[Literal["best_worker", "round_robin"]]
    policy: NotRequired[str]
    worker_addresses: NotRequired[list[str] | None]
    worker_ports: NotRequired[list[int] | None]
    index_memory_limit: NotRequired[int]
    replay: NotRequired[bool]


def routing_policy(config: RouterConfig) -> str:
    """The policy that a config asks for: ``mode: round_robin`` goes before ``policy``.

    Raises ValueError for another mode.
    """
    mode = config.get("mode", "best_worker")
    if mode not in ("best_worker", "round_robin"):
        raise ValueError(f"router mode must be 'best_worker' or 'round_robin', got {mode!r}")
    return "round_robin" if mode == "round_robin" else config.get("policy", "linear")


@dataclass(frozen=True)
class WorkerAddress:
    """Where one worker publishes: a host, its KV-event port and its load port."""

    host: str
    kv_events_port: int
    metrics_port: int

    @property
    def kv_events_endpoint(self) -> str:
        """ZMQ endpoint of the KV events."""
        return f"tcp://{_bracketed(self.host)}:{self.kv_events_port}"

    @property
    def load_endpoint(self) -> str:
        """ZMQ endpoint of the load messages."""
        return f"tcp://{_bracketed(self.host)}:{self.metrics_port}"

    @property
    def replay_endpoint(self) -> str:
        """ZMQ endpoint that replays past KV events, where ``kvrouter.vllm.kv_events_config`` puts it."""
        return f"tcp://{_bracketed(self.host)}:{self.kv_events_port + REPLAY_PORT_OFFSET}"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def check_port(port: int, setting: str) -> None:
    """Raises ValueError, naming the setting, unless ``port`` is a TCP port."""
    if isinstance(port, bool) or not isinstance(port, int) or not 1 <= port <= _MAX_PORT:
        raise ValueError(f"{setting}: port {port} is out of range (1 to {_MAX_PORT})")


def worker_addresses(
    num_workers: int,
    base_kv_events_port: int,
    base_metrics_port: int,
    addresses: Sequence[str] | None = None,
    ports: Sequence[int] | None = None,
) -> list[WorkerAddress]:
    """The addresses of workers 0 to ``num_workers`` - 1.

    Raises ValueError, naming the setting, for a count below 1, a port out of range, lists of another length than
    ``num_workers``, and two publishers that would share a port of one host.
    """
    if isinstance(num_workers, bool) or not isinstance(num_workers, int) or num_workers < 1:
        raise ValueError(f"num_workers must be at least 1, got {num_workers}")
    check_port(base_kv_events_port, "base_kv_events_port")
    check_port(base_metrics_port, "base_metrics_port")
    if addresses is not None and len(addresses) != num_workers:
        raise ValueError(
            f"Number of worker addresses ({len(addresses)}) must match number of workers ({num_workers}): "
            "check worker_addresses and num_workers"
        )
    if ports is not None and len(ports) != num_workers:
        raise ValueError(
            f"Number of worker ports ({len(ports)}) must match number of workers ({num_workers}): "
            "check worker_ports and num_workers"
        )
    workers = []
    for n in range(num_workers):
        kv_port = base_kv_events_port + n if ports is None else ports[n]
        setting = f"base_kv_events_port + {n}" if ports is None else f"worker_ports[{n}]"
        check_port(kv_port, setting)
        metrics_port = kv_port + base_metrics_port - base_kv_events_port
        check_port(metrics_port, f"the load port of worker {n} ({setting} + base_metrics_port - base_kv_events_port)")
        host = "localhost" if addresses is None else addresses[n]
        if not host:
            raise ValueError(f"worker_addresses[{n}] is empty")
        workers.append(WorkerAddress(host, kv_port, metrics_port))
    _check_distinct(workers)
    return workers


def _check_distinct(workers: Sequence[WorkerAddress]) -> None:
    taken: dict[tuple[str, int], str] = {}
    for n, worker in enumerate(workers):
        for port, what in (
            (worker.kv_events_port, f"the KV events of worker {n}"),
            (worker.metrics_port, f"the load of worker {n}"),
        ):
            other = taken.setdefault((worker.host, port), what)
            if other != what:
                raise ValueError(
                    f"port {port} of {worker.host} would carry {other} and {what}: set base_kv_events_port and "
                    f"base_metrics_port at least num_workers ({len(workers)}) apart, or worker_ports to distinct ports"
                )
