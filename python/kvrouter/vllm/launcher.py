"""Starts and stops real workers as processes of their own: vLLM servers, or the embedded worker that behaves like one.

::

    with launch_workers(2) as fleet:
        print([worker.url for worker in fleet.workers])

No worker outlives this process, whichever way it ends: each runs under a guard that notices.
"""

from __future__ import annotations

import atexit
import dataclasses
import http.client
import json
import os
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from urllib.parse import urlsplit

from kvrouter.config import REPLAY_PORT_OFFSET
from kvrouter.vllm.engines import (
    EngineOptions,
    WorkerPorts,
    check_options,
    worker_command,
    worker_environment,
)
from kvrouter.vllm.ports import PortRange, PortTakenError, find_free_ports, reserve_ports
from kvrouter.vllm.startup import StartupProgress, failure_message
from kvrouter.vllm.tiny_model import TinyModel, default_model_dir, make_tiny_model
from kvrouter.vllm.worker_process import WorkerProcess

HEALTH_POLL_S = 0.1
TINY_MODEL_NAME = "kvrouter-tiny"
_LARGEST_ANSWER = 1 << 16
_PORT_ATTEMPTS = 50


class LaunchError(RuntimeError):
    """A worker did not start, or did not do what it was asked; the message names what to change."""


@dataclasses.dataclass(frozen=True)
class Worker:
    """One worker of a fleet."""

    index: int
    url: str
    """Base of its HTTP API, e.g. ``http://127.0.0.1:8000``."""
    kv_events_endpoint: str
    """Where a router subscribes to its KV events."""
    replay_endpoint: str
    """Where a router asks for KV events that it missed."""
    load_endpoint: str
    """Where a router subscribes to its load."""
    kv_events_port: int
    metrics_port: int
    """Port of the load messages, ``base_metrics_port + index``."""
    pid: int
    log_path: Path


class WorkerFleet:
    """The workers that ``launch_workers`` started.  A context manager; methods may be called from any thread."""

    def __init__(
        self, options: EngineOptions, ports: list[WorkerPorts], log_dir: Path, own_log_dir: bool, progress: bool
    ) -> None:
        self.engine = options.engine
        self.block_size = options.block_size
        self.model = options.served_model_name
        self.workers: list[Worker] = []
        self._options = options
        self._ports = ports
        self._log_dir = log_dir
        self._own_log_dir = own_log_dir
        self._progress = progress
        self._processes: list[WorkerProcess] = []
        self._lock = threading.RLock()
        self._stopped = False
        # The guards end the workers in any case; at a normal exit they shall be gone before the interpreter is.
        reference = weakref.ref(self)
        self._at_exit = lambda: _stop_if_alive(reference)
        atexit.register(self._at_exit)

    @property
    def base_kv_events_port(self) -> int:
        """KV-events port of worker 0, as ``KvRouter`` takes it."""
        return self._ports[0].kv_events

    @property
    def base_metrics_port(self) -> int:
        """Load port of worker 0, as ``KvRouter`` takes it."""
        return self._ports[0].load

    def wait_until_healthy(self, timeout: float = 600.0) -> None:
        """Waits until every worker answers ``/health``.

        Raises ``LaunchError`` when a worker ends, with the end of its log and the setting that is likely at fault, or
        when ``timeout`` seconds are over.
        """
        self._wait_healthy(range(len(self.workers)), timeout)

    def reset_prefix_caches(self, timeout: float = 30.0) -> None:
        """Empties the prefix cache of every worker that is alive.

        A worker refuses while blocks are in use, so it is asked again until its requests are done; ``LaunchError``
        when ``timeout`` seconds are over first.  It tells its router with its next batch of KV events, not at once.
        """
        deadline = time.monotonic() + timeout
        for worker in self.workers:
            while self.is_alive(worker.index):
                status, body = _request("POST", worker.url, "/reset_prefix_cache", timeout)
                if status == 200 and not _says_failure(body):
                    break
                if status != 200 or time.monotonic() >= deadline:
                    reason = {200: "it still has requests", 0: "it does not answer"}.get(status, f"HTTP {status}")
                    raise LaunchError(f"worker {worker.index} did not reset its prefix cache: {reason}")
                time.sleep(HEALTH_POLL_S)

    def kill(self, index: int) -> None:
        """Kills a worker and its children with SIGKILL, and waits until they are gone."""
        process = self._processes[index]
        process.kill()
        process.wait()

    def restart(self, index: int, timeout: float = 600.0) -> None:
        """Starts a worker anew on its ports, after killing it if it lives, and waits until it is healthy.

        Its sequence of KV events begins at 0 again; its entry in ``workers`` is replaced.
        """
        with self._lock:
            if self._stopped:
                raise LaunchError("the fleet is stopped")
            self.kill(index)
            self._processes[index] = self._start_process(index)
            self.workers[index] = dataclasses.replace(self.workers[index], pid=self._processes[index].pid)
        self._wait_healthy([index], timeout)

    def is_alive(self, index: int) -> bool:
        """Whether the worker's process runs."""
        return self._processes[index].is_alive()

    def stop(self) -> None:
        """Ends all workers, politely first, and waits until every process is gone; calling it again does nothing."""
        with self._lock:
            if self._stopped:
                return
            self._stopped = True
            for process in self._processes:
                process.terminate()
            for process in self._processes:
                process.wait()
            atexit.unregister(self._at_exit)
            if self._own_log_dir:
                shutil.rmtree(self._log_dir, ignore_errors=True)

    def __enter__(self) -> WorkerFleet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _start(self) -> None:
        with self._lock:
            for index, ports in enumerate(self._ports):
                process = self._start_process(index)
                self._processes.append(process)
                self.workers.append(self._describe(index, ports, process))

    def _start_process(self, index: int) -> WorkerProcess:
        ports = self._ports[index]
        return WorkerProcess(
            worker_command(self._options, index, ports),
            worker_environment(self._options, index, ports),
            self._log_dir / f"worker-{index}.log",
        )

    def _describe(self, index: int, ports: WorkerPorts, process: WorkerProcess) -> Worker:
        host = "127.0.0.1" if self._options.host in ("0.0.0.0", "::", "") else self._options.host
        return Worker(
            index=index,
            url=f"http://{host}:{ports.http}",
            kv_events_endpoint=f"tcp://{host}:{ports.kv_events}",
            replay_endpoint=f"tcp://{host}:{ports.replay}",
            load_endpoint=f"tcp://{host}:{ports.load}",
            kv_events_port=ports.kv_events,
            metrics_port=ports.load,
            pid=process.pid,
            log_path=process.log_path,
        )

    def _wait_healthy(self, indices: Sequence[int], timeout: float) -> None:
        deadline = time.monotonic() + timeout
        waiting = list(indices)
        with (
            StartupProgress(self.engine, len(waiting), enabled=self._progress) as progress,
            ThreadPoolExecutor(max_workers=min(8, len(waiting) or 1)) as pool,
        ):
            while waiting:
                for index in waiting:
                    if not self.is_alive(index):
                        process = self._processes[index]
                        process.wait(5.0)
                        raise LaunchError(failure_message(index, process.exit_code, process.tail(60), process.log_path))
                answers = list(
                    pool.map(lambda index: _request("GET", self.workers[index].url, "/health", 2.0), waiting)
                )
                waiting = [index for index, (status, _) in zip(waiting, answers, strict=True) if status != 200]
                progress.update(len(indices) - len(waiting))
                if waiting and time.monotonic() >= deadline:
                    worker = self.workers[waiting[0]]
                    raise LaunchError(
                        f"worker {waiting[0]} was not healthy after {timeout:.0f} s: raise startup_timeout_s, or see "
                        f"its log {worker.log_path}, which ends in\n{self._processes[waiting[0]].tail(15)}"
                    )
                if waiting:
                    time.sleep(HEALTH_POLL_S)


def launch_workers(
    num_workers: int,
    *,
    engine: str = "vllm",
    model: str | os.PathLike[str] | TinyModel | None = None,
    block_size: int = 64,
    host: str = "127.0.0.1",
    base_http_port: int | None = None,
    base_kv_events_port: int | None = None,
    base_metrics_port: int | None = None,
    num_gpu_blocks: int | None = None,
    max_model_len: int = 8192,
    max_num_seqs: int = 64,
    max_num_batched_tokens: int = 2048,
    kv_events: bool = True,
    load_publisher: bool = True,
    extra_args: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    log_dir: str | os.PathLike[str] | None = None,
    startup_timeout_s: float = 600.0,
    progress: bool = True,
) -> WorkerFleet:
    """Starts workers and waits until all are healthy.

    Parameters
    ----------
    num_workers
        How many.  On CPU each computes on one core; on GPU worker i has GPU i, shared when there are fewer.
    engine
        ``"vllm"``, or ``"sim"`` for the embedded worker.
    model
        A ``TinyModel``, a model's name or its folder; None makes a small random-weight model (see
        ``make_tiny_model``).
    block_size
        Tokens in a KV block; on CPU a multiple of 32.
    host
        Address of the HTTP servers.  vLLM's KV-event sockets listen on every interface whatever this is.
    base_http_port, base_kv_events_port, base_metrics_port
        Ports of worker 0; worker N has these plus N.  None finds free ones.
    num_gpu_blocks
        KV blocks of each worker's cache (on CPU too); None leaves it to the engine.
    max_model_len, max_num_seqs, max_num_batched_tokens
        vLLM's settings of these names.
    kv_events, load_publisher
        Whether workers publish their KV events and their load.
    extra_args, env
        Further arguments and environment variables of each worker; they win over what is set here.
    log_dir
        Folder for ``worker-N.log``; None takes a temporary one, removed once the workers have been stopped after a
        successful start.
    startup_timeout_s
        Seconds until every worker must be healthy.
    progress
        Whether to show a progress line on standard error.

    Raises
    ------
    ValueError
        For a setting that cannot be; the message names it.
    PortTakenError
        When a given port is in use; the message names the port, the setting and, where it can be told, the process.
    LaunchError
        When a worker does not become healthy.  No process is left behind.
    """
    tiny = _tiny_model(engine, model, max_model_len)
    options = EngineOptions(
        engine=engine,
        num_workers=num_workers,
        model=str(tiny.path) if tiny else str(model or ""),
        served_model_name=TINY_MODEL_NAME if model is None or tiny else str(model),
        tiny_model=tiny,
        block_size=block_size,
        host=host,
        num_gpu_blocks=num_gpu_blocks,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        kv_events=kv_events,
        load_publisher=load_publisher,
        extra_args=tuple(extra_args),
        env=dict(env or {}),
    )
    check_options(options)
    held = _reserve(num_workers, base_http_port, base_kv_events_port, base_metrics_port)
    try:
        ports = [WorkerPorts(*(range_[index] for range_ in held)) for index in range(num_workers)]
        folder = Path(log_dir) if log_dir is not None else Path(tempfile.mkdtemp(prefix="kvrouter-workers-"))
        folder.mkdir(parents=True, exist_ok=True)
        fleet = WorkerFleet(options, ports, folder, own_log_dir=log_dir is None, progress=progress)
        try:
            fleet._start()
            fleet.wait_until_healthy(startup_timeout_s)
        except BaseException as error:
            # The log is worth keeping when the failure is the workers'.
            fleet._own_log_dir = fleet._own_log_dir and not isinstance(error, LaunchError)
            fleet.stop()
            if isinstance(error, RuntimeError) and not isinstance(error, LaunchError):
                raise LaunchError(str(error)) from error
            raise
        return fleet
    finally:
        for range_ in held:
            range_.release()


def _tiny_model(engine: str, model: str | os.PathLike[str] | TinyModel | None, max_model_len: int) -> TinyModel | None:
    if isinstance(model, TinyModel):
        return model
    if model is not None or engine != "vllm":
        return None
    length = max(8192, max_model_len)
    return make_tiny_model(default_model_dir() / f"tiny-qwen2-512x8-{length}", max_position_embeddings=length)


def _reserve(num_workers: int, http: int | None, kv_events: int | None, load: int | None) -> list[PortRange]:
    """Ranges of HTTP, KV-events, replay and load ports, in this order, held until released."""
    held: list[PortRange] = []
    try:
        held.append(_range(num_workers, http, "base_http_port"))
        held.extend(_reserve_events(num_workers, kv_events))
        held.append(_range(num_workers, load, "base_metrics_port"))
    except BaseException:
        for range_ in held:
            range_.release()
        raise
    return held


def _range(num_workers: int, base: int | None, setting: str) -> PortRange:
    return find_free_ports(num_workers) if base is None else reserve_ports(base, num_workers, setting)


def _reserve_events(num_workers: int, base: int | None) -> tuple[PortRange, PortRange]:
    """Ports for KV events and, where routers look for it (``REPLAY_PORT_OFFSET`` above), for replays."""
    attempts = _PORT_ATTEMPTS if base is None else 1
    while True:
        events = _range(num_workers, base, "base_kv_events_port")
        setting = f"base_kv_events_port + {REPLAY_PORT_OFFSET}, for replay"
        try:
            return events, reserve_ports(events[0] + REPLAY_PORT_OFFSET, num_workers, setting)
        except (PortTakenError, ValueError):
            events.release()
            attempts -= 1
            if not attempts:
                raise


def _request(method: str, url: str, path: str, timeout_s: float) -> tuple[int, bytes]:
    """Status and body of the answer to a request without a body; status 0 when there is no answer."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout_s)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.read(_LARGEST_ANSWER)
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()


def _says_failure(body: bytes) -> bool:
    """Whether an answer is ``{"success": false}``; engines that cannot fail answer without a body."""
    try:
        answer = json.loads(body)
    except ValueError:
        return False
    return isinstance(answer, dict) and answer.get("success") is False


def _stop_if_alive(reference: weakref.ref[WorkerFleet]) -> None:
    fleet = reference()
    if fleet is not None:
        fleet.stop()
