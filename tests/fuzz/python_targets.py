"""Fuzz targets in Python: files that a user hands over.  What is wrong with one is a ValueError that says so.

``python tests/fuzz/python_targets.py NAME [LIBFUZZER OPTIONS] [CORPUS...]`` fuzzes one with Atheris.  The tests run the
same bodies over the corpora, and over random input, without it.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def workers_file(data: bytes, folder: Path) -> None:
    """``kvrouter serve --workers-file FILE``; its text also as a ``--worker``."""
    from kvrouter.worker_spec import WorkerSpec, read_workers_file

    path = folder / "workers.json"
    path.write_bytes(data)
    with suppress(ValueError):
        for worker in read_workers_file(path):
            assert worker.url.startswith("http://")
            assert all(isinstance(at, str) for at in (worker.kv_events, worker.replay, worker.load))
    with suppress(ValueError):
        WorkerSpec.parse(data.decode("utf-8", "surrogateescape"))


def trace_file(data: bytes, folder: Path) -> None:
    """``kvrouter simulate --trace FILE``, plain or, where the first byte is odd, compressed."""
    from kvrouter.simulate.workloads import read_trace, trace_requests

    path = folder / ("trace.jsonl.xz" if data[:1] and data[0] & 1 else "trace.jsonl")
    path.write_bytes(data[1:])
    with suppress(ValueError):
        lines = read_trace(path)
        requests = trace_requests("fuzzed", lines, max_model_len=4096)
        assert len(requests.columns()["arrival"]) == len(lines)


def grpo_config(data: bytes, folder: Path) -> None:
    """``examples/run_grpo.py --config FILE``."""
    from kvrouter.grpo.config import load_config

    path = folder / "config.yaml"
    path.write_bytes(data)
    with suppress(ValueError):
        load_config(path)


def router_config(data: bytes, folder: Path) -> None:
    """The router's section of a config file."""
    from kvrouter.config import worker_addresses

    try:
        config = json.loads(data)
    except (ValueError, RecursionError):
        return
    if not isinstance(config, dict):
        return
    with suppress(ValueError):
        workers = worker_addresses(
            config.get("num_workers", 1),
            config.get("base_kv_events_port", 5557),
            config.get("base_metrics_port", 5657),
            config.get("worker_addresses"),
            config.get("worker_ports"),
        )
        assert all(1 <= port <= 65535 for worker in workers for port in (worker.kv_events_port, worker.metrics_port))


TARGETS: dict[str, Callable[[bytes, Path], None]] = {
    target.__name__: target for target in (workers_file, trace_file, grpo_config, router_config)
}


def main() -> None:
    """Fuzzes the target that the first argument names; the rest is libFuzzer's."""
    import atheris

    name, *options = sys.argv[1:]
    with atheris.instrument_imports(include=["kvrouter"]):
        import kvrouter.config
        import kvrouter.serve

        if name == "trace_file":
            import kvrouter.simulate.workloads
        if name == "grpo_config":
            import kvrouter.grpo.config  # noqa: F401
    shm = Path("/dev/shm")  # a file an input: in memory where there is such a place
    with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as folder:
        atheris.Setup([name, *options], lambda data: TARGETS[name](data, Path(folder)))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
