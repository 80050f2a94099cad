"""Ray on this machine, for benchmarks and tests: one node or several, each a raylet of its own, gone at the end."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import ray
from ray.cluster_utils import Cluster

STORE_BYTES = 128 * 1024 * 1024


@contextmanager
def local_ray(
    num_nodes: int = 1, cpus_per_node: float = 2, gpus_per_node: int | None = 0, *, log_to_driver: bool = False
) -> Iterator[None]:
    """Connects this process to a Ray of its own; nothing of it is left when this ends, also by an exception.

    cpus_per_node: what each node says it has; it need not be true.
    gpus_per_node: None: what Ray finds (for one node only).
    log_to_driver: whether the workers' output is shown here.
    """
    quiet: dict[str, Any] = {"log_to_driver": log_to_driver, "logging_level": "ERROR"}
    node: dict[str, Any] = {"num_cpus": cpus_per_node, "object_store_memory": STORE_BYTES}
    if gpus_per_node is not None:
        node["num_gpus"] = gpus_per_node
    with ExitStack() as stack:
        stack.enter_context(_own_environment())
        if num_nodes == 1:
            stack.callback(ray.shutdown)
            # "local": never a cluster that somebody else runs here.
            ray.init("local", **node, include_dashboard=False, **quiet)
        else:
            cluster = Cluster()
            stack.callback(cluster.shutdown)
            stack.callback(ray.shutdown)
            cluster.add_node(**node, include_dashboard=False)
            for _ in range(num_nodes - 1):
                cluster.add_node(**node)
            ray.init(address=cluster.address, **quiet)
        yield


@contextmanager
def _own_environment() -> Iterator[None]:
    """Ray's files in a folder that goes with it: also the note by which ray.init() finds a running cluster.

    The folder is right below /tmp, as a node's sockets lie in it and the path of a socket has 107 characters at most.
    Ray would give workers a low priority; here they are what is measured.
    """
    with tempfile.TemporaryDirectory(prefix="kvr-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        os.mkdir(os.path.join(folder, "ray"))
        own = {"RAY_TMPDIR": folder, "RAY_worker_niceness": "0"}
        before = {name: os.environ.get(name) for name in own}
        os.environ.update(own)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
