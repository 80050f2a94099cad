"""The router as a process of its own, and what it says of itself over HTTP."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from kvrouter.bench.local_http import HttpError, http_request
from kvrouter.service_client import ServiceClient
from kvrouter.vllm.worker_process import WorkerProcess

_STOP_S = 5.0


class RouterAdmin:
    """A running router, seen from outside: ``GET /health``, ``GET /workers``, ``POST /reset``."""

    def __init__(self, url: str, *, timeout_s: float = 5.0) -> None:
        self.url = url.rstrip("/")
        self._timeout_s = timeout_s

    def healthy(self) -> bool:
        """Whether it answers ``GET /health`` with 200."""
        try:
            http_request(f"{self.url}/health", timeout_s=self._timeout_s)
        except HttpError:
            return False
        return True

    def workers(self) -> dict[str, Any]:
        """The answer of ``GET /workers``: the router's figures, and under ``"workers"`` one object a worker.

        Raises:
            HttpError: it does not answer, or not with that.
        """
        return ServiceClient(self.url, timeout_s=self._timeout_s).workers()

    def reset(self) -> None:
        """Make it forget what the workers cache.

        Raises:
            HttpError: it does not answer.
        """
        http_request(f"{self.url}/reset", post=True, timeout_s=self._timeout_s)

    def events(self) -> list[int]:
        """KV events applied so far, one count a worker."""
        return [int(worker.get("events", 0)) for worker in self.workers()["workers"]]

    def settle(self, *, quiet_s: float = 0.05, timeout_s: float = 5.0) -> bool:
        """Wait until no KV event has been applied for `quiet_s`; False if that takes longer than `timeout_s`.

        Raises:
            HttpError: it does not answer.
        """
        return settled(self.events, quiet_s, timeout_s)


def settled(reading: Callable[[], object], quiet_s: float, timeout_s: float) -> bool:
    """Wait until a reading has not changed for `quiet_s`; False if that takes longer than `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    seen, since = reading(), time.monotonic()
    while time.monotonic() < deadline:
        time.sleep(quiet_s / 5)
        now = reading()
        if now != seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since >= quiet_s:
            return True
    return False


class RouterProcess:
    """``python -m kvrouter.api`` as a child; a context manager that waits for its health and always stops it.

    It runs under the guard that workers run under, so it does not outlive this process either.
    """

    def __init__(
        self,
        *,
        host: str,
        port: int,
        block_size: int,
        kv_events_ports: Sequence[int],
        metrics_ports: Sequence[int],
        worker_urls: Sequence[str],
        policy: str,
        seed: int,
        log_level: str = "WARNING",
        log_dir: Path | None = None,
        startup_s: float = 30.0,
    ) -> None:
        self.host = host
        self.port = port or free_port(host)
        self.admin = RouterAdmin(f"http://{host}:{self.port}")
        self._startup_s = startup_s
        self._log_dir = log_dir
        self._process: WorkerProcess | None = None
        self._cleanup = ExitStack()
        for name, ports in (("KV-events", kv_events_ports), ("metrics", metrics_ports)):
            if list(ports) != list(range(ports[0], ports[0] + len(ports))):
                raise ValueError(f"the workers' {name} ports must follow each other, got {list(ports)}")
        self._command = [sys.executable, "-m", "kvrouter.api", f"--host={host}", f"--port={self.port}"]
        self._command += [f"--block-size={block_size}", f"--num-workers={len(kv_events_ports)}"]
        self._command += [f"--base-kv-events-port={kv_events_ports[0]}", f"--base-metrics-port={metrics_ports[0]}"]
        self._command += [f"--worker-urls={','.join(worker_urls)}", f"--policy={policy}", f"--seed={seed}"]
        self._command.append(f"--log-level={log_level}")

    @property
    def url(self) -> str:
        """Where it listens."""
        return self.admin.url

    @property
    def pid(self) -> int | None:
        """Its process id while it runs."""
        return None if self._process is None else self._process.pid

    def kill(self) -> None:
        """Kill it, as a crash would, and wait until it is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> RouterProcess:
        check_port_is_free(self.host, self.port, flag="--router-port")
        with ExitStack() as stack:
            log_dir = self._log_dir or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvrouter-router-")))
            log_dir.mkdir(parents=True, exist_ok=True)
            log = log_dir / "router.log"
            log.unlink(missing_ok=True)
            self._process = WorkerProcess(self._command, dict(os.environ), log, grace_s=_STOP_S)
            stack.callback(self._stop, self._process)
            self._wait_for_health(self._process)
            self._cleanup = stack.pop_all()
        return self

    def __exit__(self, _t: type[BaseException] | None, _e: BaseException | None, _tb: TracebackType | None) -> None:
        self._cleanup.close()

    def _stop(self, process: WorkerProcess) -> None:
        self._process = None
        process.terminate()
        process.wait()

    def _wait_for_health(self, process: WorkerProcess) -> None:
        deadline = time.monotonic() + self._startup_s
        while not self.admin.healthy():
            if not process.is_alive():
                process.wait(1.0)
                raise RuntimeError(f"the router process ended with status {process.exit_code}:\n{process.tail(20)}")
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"the router process is not healthy after {self._startup_s:g} s (--router-startup-wait):\n"
                    f"{process.tail(20)}"
                )
            time.sleep(0.05)


def free_port(host: str) -> int:
    """A TCP port that nobody listens on at `host` now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def check_port_is_free(host: str, port: int, *, flag: str) -> None:
    """Refuse a port that is taken.

    Raises:
        ValueError: names the port and the flag.
    """
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise ValueError(f"cannot listen on {host}:{port} ({error.strerror}): choose another {flag}") from error
