"""``kvrouter serve``: the router in front of a fleet of vLLM servers, as an OpenAI-compatible gateway.

C++ from socket to socket; Python reads the options, and waits.
"""

from __future__ import annotations

import json
import logging
import re
import signal
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

import typer
from typing_extensions import Self

from kvrouter.config import DEFAULT_BLOCK_SIZE

DEFAULT_SERVE_PORT = 9000
_ENDPOINT_KEYS = ("kv_events", "replay", "load")
_BLOCK_SIZE = re.compile(r'^vllm:cache_config_info\{(?:.*,)?block_size="(\d+)"', re.MULTILINE)


@dataclass(frozen=True)
class WorkerSpec:
    """A worker of the fleet: the base URL of its HTTP server and, optionally, its ZMQ endpoints."""

    url: str
    kv_events: str = ""
    replay: str = ""
    load: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """From ``http://host:port,kv_events=tcp://...,replay=tcp://...,load=tcp://...``.

        Raises ValueError, saying what is wrong.
        """
        url, *pairs = (part.strip() for part in text.split(","))
        if not re.fullmatch(r"http://(\[[0-9a-fA-F:.]+\]|[^/\[\]:]+):\d+/?", url):
            raise ValueError(f"--worker {text}: it must begin with http://host:port")
        endpoints: dict[str, str] = {}
        for pair in pairs:
            key, _, value = pair.partition("=")
            if key not in _ENDPOINT_KEYS or not value:
                raise ValueError(f"--worker {text}: '{pair}' is none of kv_events=, replay=, load=")
            if not re.match(r"(tcp|ipc|inproc)://.", value):
                raise ValueError(f"--worker {text}: {key} must be a ZMQ endpoint such as tcp://host:5557")
            if key in endpoints:
                raise ValueError(f"--worker {text}: {key} is given twice")
            endpoints[key] = value
        return cls(url.rstrip("/"), **endpoints)

    @classmethod
    def from_dict(cls, entry: Any) -> Self:
        """From an entry of a workers file: ``{"url": ..., "kv_events": ..., "replay": ..., "load": ...}``."""
        if not isinstance(entry, dict) or not isinstance(entry.get("url"), str):
            raise ValueError(f'{entry!r} is no worker: {{"url": "http://host:port"}} at least')
        unknown = set(entry) - {"url", *_ENDPOINT_KEYS}
        if unknown:
            raise ValueError(f"worker {entry['url']}: unknown keys {sorted(unknown)}")
        return cls.parse(",".join([entry["url"], *(f"{key}={entry[key]}" for key in _ENDPOINT_KEYS if entry.get(key))]))


@dataclass
class ServeOptions:
    """What ``kvrouter serve`` can be told.  Times in seconds; the meanings are those of the command's options."""

    workers: list[WorkerSpec] = field(default_factory=list)
    host: str = "127.0.0.1"
    port: int = DEFAULT_SERVE_PORT
    block_size: int = DEFAULT_BLOCK_SIZE
    policy: str = "linear"
    seed: int = 0
    max_workers: int = 32
    index_memory_limit: int = 0
    api_token: str = ""
    admin_token: str = ""
    access_log: str = ""
    limits: dict[str, Any] = field(default_factory=dict)
    """Further settings of ``_core.Service``: ``max_concurrency``, ``max_queue``, ``queue_timeout_s``, ..."""


class KvService:
    """The service in this process, in threads of its own: a context manager, from start to stop.

    Raises OSError when the address cannot be bound, ValueError for options out of range.
    """

    def __init__(self, options: ServeOptions) -> None:
        from kvrouter import _core
        from kvrouter.router import Listening

        slots = max(options.max_workers, len(options.workers), 1)
        empty = [""] * slots
        self.host = options.host
        self._router = _core.Router(
            block_size=options.block_size,
            kv_events=empty,
            load=empty,
            http=empty,
            policy=options.policy,
            seed=options.seed,
            index_memory_limit=options.index_memory_limit,
        )
        self._listening = Listening(self._router)
        self._listening.start(True)
        try:
            self._service = _core.Service(
                self._router,
                host=options.host,
                port=options.port,
                workers=[(w.url, w.kv_events, w.replay, w.load) for w in options.workers],
                api_token=options.api_token,
                admin_token=options.admin_token,
                loopback=is_loopback(options.host),
                access_log=options.access_log,
                **options.limits,
            )
        except BaseException:
            self._listening.stop()
            raise
        self.port: int = self._service.port

    @property
    def url(self) -> str:
        """Base of its HTTP API."""
        return f"http://{'127.0.0.1' if self.host in ('0.0.0.0', '*', '') else self.host}:{self.port}"

    def close(self) -> None:
        """Stops it.  A second call does nothing."""
        self._service.stop()
        self._listening.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on ``host``."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def read_workers_file(path: Path) -> list[WorkerSpec]:
    """The workers of a JSON file: a list of objects, as ``WorkerSpec.from_dict`` takes them.

    Raises ValueError, naming the file, when it is not that; OSError when it cannot be read.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(entries, list):
            raise ValueError("it must hold a list of workers")
        return [WorkerSpec.from_dict(entry) for entry in entries]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def detect_block_size(workers: list[WorkerSpec], timeout_s: float) -> int:
    """The block size that the workers' /metrics name, in tokens.

    Raises ValueError when none answers within ``timeout_s`` seconds, or two disagree.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        found: dict[int, str] = {}
        for worker in workers:
            try:
                with urllib.request.urlopen(f"{worker.url}/metrics", timeout=5) as answer:
                    match = _BLOCK_SIZE.search(answer.read(8 << 20).decode("utf-8", "replace"))
            except (OSError, ValueError):
                continue
            if match:
                found[int(match[1])] = worker.url
        if len(found) > 1:
            raise ValueError(
                "workers differ in their block size: "
                + ", ".join(f"{url} has {size} tokens" for size, url in found.items())
                + ". Start all with the same --block-size"
            )
        if found:
            return next(iter(found))
        if time.monotonic() >= deadline:
            raise ValueError(
                f"no worker told its block size on /metrics within {timeout_s:g} s: is one running? "
                "Else set --block-size"
            )
        time.sleep(0.5)


def _read_token(path: Path | None) -> str:
    if path is None:
        return ""
    token = path.read_text(encoding="utf-8").strip()
    if not token:
        raise ValueError(f"{path} is empty: it must hold a token")
    return token


def serve(
    worker: Annotated[
        list[str] | None,
        typer.Option(
            help="http://host:port[,kv_events=tcp://...][,replay=tcp://...][,load=tcp://...]; one option a worker."
        ),
    ] = None,
    workers_file: Annotated[
        Path | None, typer.Option(help="JSON list of workers; watched, so that they come and go with it.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0: any free one.", min=0, max=65535)] = (
        DEFAULT_SERVE_PORT
    ),
    block_size: Annotated[str, typer.Option(help="Tokens a KV block; auto: as the workers' /metrics say.")] = "auto",
    policy: Annotated[str, typer.Option(help="One of kvrouter.policy_names().")] = "linear",
    max_workers: Annotated[int, typer.Option(help="Most workers at a time.", min=1)] = 32,
    index_memory_limit: Annotated[int, typer.Option(help="Bytes the prefix index may take; 0: no limit.", min=0)] = 0,
    max_concurrency: Annotated[int, typer.Option(help="Most requests at a worker at a time.", min=1)] = 256,
    max_queue: Annotated[int, typer.Option(help="Most requests waiting; beyond: 429.", min=0)] = 1024,
    queue_timeout: Annotated[float, typer.Option(help="Seconds a request may wait; then 503.", min=0.001)] = 30.0,
    first_byte_timeout: Annotated[float, typer.Option(help="Seconds until an answer begins.", min=0.001)] = 600.0,
    stream_timeout: Annotated[float, typer.Option(help="Seconds between two pieces of an answer.", min=0.001)] = 300.0,
    max_body_bytes: Annotated[int, typer.Option(help="Longest request body.", min=1)] = 16 << 20,
    max_header_bytes: Annotated[int, typer.Option(help="Longest request head.", min=256)] = 16 << 10,
    api_token_file: Annotated[Path | None, typer.Option(help="File with the bearer token of the API.")] = None,
    admin_token_file: Annotated[Path | None, typer.Option(help="File with that of admin calls.")] = None,
    access_log: Annotated[str, typer.Option(help="File for a JSON line a request; '-': standard error.")] = "",
    startup_timeout: Annotated[float, typer.Option(help="Seconds to wait for a block size.", min=0)] = 300.0,
    log_level: Annotated[str, typer.Option(help="Of the router's own log.")] = "INFO",
) -> None:
    """Serve an OpenAI-compatible gateway over vLLM workers; listens on loopback unless told otherwise."""
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    stop_signals = {signal.SIGINT, signal.SIGTERM}
    try:
        workers = [WorkerSpec.parse(text) for text in worker or []]
        if workers_file:
            workers += read_workers_file(workers_file)
        if block_size == "auto":
            size = detect_block_size(workers, startup_timeout) if workers else DEFAULT_BLOCK_SIZE
        elif block_size.isdigit() and int(block_size) > 0:
            size = int(block_size)
        else:
            raise ValueError(f"--block-size {block_size} is neither auto nor a number of tokens")
        options = ServeOptions(
            workers=workers,
            host=host,
            port=port,
            block_size=size,
            policy=policy,
            max_workers=max_workers,
            index_memory_limit=index_memory_limit,
            api_token=_read_token(api_token_file),
            admin_token=_read_token(admin_token_file),
            access_log=access_log,
            limits={
                "max_concurrency": max_concurrency,
                "max_queue": max_queue,
                "queue_timeout_s": queue_timeout,
                "first_byte_timeout_s": first_byte_timeout,
                "stream_timeout_s": stream_timeout,
                "max_body_bytes": max_body_bytes,
                "max_header_bytes": max_header_bytes,
            },
        )
        signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals)  # before any thread starts: all inherit it
        service = KvService(options)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    with service:
        print(f"kvrouter: serving on {service.url} (block size {size}, {len(workers)} workers)", flush=True)
        if not is_loopback(host) and not options.api_token:
            print("kvrouter: anyone who reaches this address may use it: set --api-token-file", file=sys.stderr)
        _wait(stop_signals, service, workers_file, options)


def _wait(signals: set[signal.Signals], service: KvService, path: Path | None, options: ServeOptions) -> None:
    """Until a signal; meanwhile follows the workers file."""
    from kvrouter.workers_file import WorkersFile

    watched = WorkersFile(path, service.url, options.admin_token or options.api_token) if path else None
    while signal.sigtimedwait(signals, 1.0) is None:
        if watched:
            watched.follow()
