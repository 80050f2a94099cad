"""``kvrouter serve``: the router in front of a fleet of vLLM servers, as an OpenAI-compatible gateway.

C++ from socket to socket; Python reads the options, and waits.
"""

from __future__ import annotations

import contextlib
import logging
import re
import signal
import ssl
import sys
import time
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Protocol

import typer
from typing_extensions import Self

from kvrouter.bench.local_http import HttpError
from kvrouter.config import DEFAULT_BLOCK_SIZE
from kvrouter.service_client import ServiceClient, read_token
from kvrouter.snapshot import SnapshotWriter, warm_start
from kvrouter.worker_spec import DnsSpec, WorkerSpec, parse_workers, read_workers_file

DEFAULT_SERVE_PORT = 9000
_BLOCK_SIZE = re.compile(r'^vllm:cache_config_info\{(?:.*,)?block_size="(\d+)"', re.MULTILINE)


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
    tls_cert: str = ""
    """PEM file, leaf first; with ``tls_key``: the service speaks TLS, and nothing else."""
    tls_key: str = ""
    upstream_ca: str = ""
    """PEM file of the authorities to trust for https workers; "": the system's."""
    replica_bind: str = ""
    """``tcp://address:port`` at which other replicas of the service hear this one; "": nowhere."""
    replica_peers: list[str] = field(default_factory=list)
    """Where the others are heard; one that is this replica itself is left out."""
    replica_timeout_s: float = 3.0
    """Of silence, after which what a replica has in flight counts no more."""
    snapshot: Path | None = None
    """File with what is known of the workers' caches: read at the start, written at the end and by POST /snapshot."""
    snapshot_interval_s: float = 0.0
    """Between two snapshots while it serves; 0: none."""
    snapshot_from: str = ""
    """URL of another replica, whose GET /snapshot is asked first when this one starts."""
    limits: dict[str, Any] = field(default_factory=dict)
    """Further settings of ``_core.Service``: ``max_concurrency``, ``max_queue``, ``queue_timeout_s``, ..."""


class KvService:
    """The service in this process, in threads of its own: a context manager, from start to stop.

    Raises OSError when the address cannot be bound, ValueError for options out of range.
    """

    def __init__(self, options: ServeOptions) -> None:
        from kvrouter import _core
        from kvrouter.router import Listening

        if bool(options.tls_cert) != bool(options.tls_key):
            raise ValueError("--tls-cert and --tls-key go together: give both or neither")
        slots = max(options.max_workers, sum(len(worker.ranks()) for worker in options.workers), 1)
        empty = [""] * slots
        self.host = options.host
        self.tls = bool(options.tls_cert)
        self._router = _core.Router(
            block_size=options.block_size,
            kv_events=empty,
            load=empty,
            http=empty,
            policy=options.policy,
            seed=options.seed,
            ca_file=options.upstream_ca,
            index_memory_limit=options.index_memory_limit,
            replica_bind=options.replica_bind,
            replica_peers=options.replica_peers,
            replica_timeout_s=options.replica_timeout_s,
        )
        peer = None
        if options.snapshot_from:
            ca_file = Path(options.upstream_ca) if options.upstream_ca else None
            peer = ServiceClient(options.snapshot_from, options.admin_token or options.api_token, ca_file)
        warm_start(self._router, options.snapshot, peer)
        self.snapshots: SnapshotWriter | None = None
        if options.snapshot:
            self.snapshots = SnapshotWriter(self._router, options.snapshot, options.snapshot_interval_s)
        self._listening = Listening(self._router)
        self._listening.start(True)
        try:
            self._service = _core.Service(
                self._router,
                host=options.host,
                port=options.port,
                workers=[(w.url, w.kv_events, w.replay, w.load, w.data_parallel_size) for w in options.workers],
                api_token=options.api_token,
                admin_token=options.admin_token,
                loopback=is_loopback(options.host),
                access_log=options.access_log,
                tls_cert=options.tls_cert,
                tls_key=options.tls_key,
                upstream_ca=options.upstream_ca,
                snapshot_file=str(options.snapshot or ""),
                **options.limits,
            )
        except BaseException:
            self._listening.stop()
            raise
        self.port: int = self._service.port

    @property
    def url(self) -> str:
        """Base of its HTTP API."""
        host = {"0.0.0.0": "127.0.0.1", "*": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        if ":" in host and not host.startswith("["):
            host = f"[{host}]"
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}"

    def close(self) -> None:
        """Stops it, and writes its snapshot if it has a file for it.  A second call does nothing."""
        self._service.stop()
        if self.snapshots and self._router.running:
            self.snapshots.write()
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


def detect_block_size(workers: list[WorkerSpec], timeout_s: float, ca_file: Path | None = None) -> int:
    """The block size that the workers' /metrics name, in tokens.

    ca_file: whom to trust for https workers; None: the system's authorities.

    Raises ValueError when none answers within ``timeout_s`` seconds, or two disagree.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        found: dict[int, str] = {}
        for worker in workers:
            try:
                match = _BLOCK_SIZE.search(ServiceClient(worker.url, "", ca_file).text("GET", "/metrics"))
            except HttpError:
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


def serve(
    worker: Annotated[
        list[str] | None,
        typer.Option(
            help="http(s)://host:port[,kv_events=tcp://...][,replay=tcp://...][,load=tcp://...]"
            "[,data_parallel_size=N]; one option a server. "
            "dns://name:port[,kv_events=tcp://*:...]: a worker at each of the name's addresses."
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
    tls_cert: Annotated[Path | None, typer.Option(help="PEM certificate chain: serve TLS only.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM key of --tls-cert.")] = None,
    upstream_ca: Annotated[
        Path | None, typer.Option(help="PEM file of whom to trust for https workers; default: the system's.")
    ] = None,
    replica_bind: Annotated[
        str, typer.Option(help="tcp://address:port at which other replicas hear this one; default: nowhere.")
    ] = "",
    replica_peer: Annotated[
        list[str] | None, typer.Option(help="tcp://host:port at which another replica is heard; one option each.")
    ] = None,
    replica_timeout: Annotated[
        float, typer.Option(help="Seconds of silence until another replica counts as gone.", min=0.5)
    ] = 3.0,
    snapshot: Annotated[
        Path | None, typer.Option(help="File with what is known of the workers' caches: read now, written at the end.")
    ] = None,
    snapshot_interval: Annotated[
        float, typer.Option(help="Seconds between two snapshots meanwhile; 0: none.", min=0)
    ] = 0.0,
    snapshot_from: Annotated[
        str, typer.Option(help="URL of a replica whose snapshot is taken instead, if it answers.")
    ] = "",
    dns_interval: Annotated[float, typer.Option(help="Seconds between look-ups of dns:// names.", min=0.1)] = 5.0,
    access_log: Annotated[str, typer.Option(help="File for a JSON line a request; '-': standard error.")] = "",
    startup_timeout: Annotated[float, typer.Option(help="Seconds to wait for a block size.", min=0)] = 300.0,
    log_level: Annotated[str, typer.Option(help="Of the router's own log.")] = "INFO",
) -> None:
    """Serve an OpenAI-compatible gateway over vLLM workers; listens on loopback unless told otherwise."""
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    stop_signals = {signal.SIGINT, signal.SIGTERM}
    try:
        workers, names = parse_workers(worker or [])
        if workers_file:
            workers += read_workers_file(workers_file)
        if block_size == "auto":
            found = workers + _first_of(names)
            size = detect_block_size(found, startup_timeout, upstream_ca) if found else DEFAULT_BLOCK_SIZE
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
            api_token=read_token(api_token_file),
            admin_token=read_token(admin_token_file),
            access_log=access_log,
            tls_cert=str(tls_cert or ""),
            tls_key=str(tls_key or ""),
            upstream_ca=str(upstream_ca or ""),
            replica_bind=replica_bind,
            replica_peers=replica_peer or [],
            replica_timeout_s=replica_timeout,
            snapshot=snapshot,
            snapshot_interval_s=snapshot_interval,
            snapshot_from=snapshot_from,
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
        if not is_loopback(host) and not service.tls:
            print("kvrouter: what passes here can be read on the way: set --tls-cert", file=sys.stderr)
        _wait(stop_signals, _followers(service, options, workers_file, names, dns_interval))


class _Follower(Protocol):
    def follow(self) -> None: ...


def _first_of(names: list[DnsSpec]) -> list[WorkerSpec]:
    """A worker of each name that has an address by now."""
    from kvrouter.dns_workers import resolve

    found = []
    for name in names:
        with contextlib.suppress(OSError):
            found.append(name.at(resolve(name.host)[0]))
    return found


def _followers(
    service: KvService, options: ServeOptions, path: Path | None, names: list[DnsSpec], dns_interval_s: float
) -> list[_Follower]:
    """What tells the service, by its own API, which workers come and go."""
    from kvrouter.dns_workers import DnsWorkers
    from kvrouter.workers_file import WorkersFile

    client = ServiceClient(
        service.url, options.admin_token or options.api_token, timeout_s=10, tls=_tls_to_itself(options)
    )
    followers: list[_Follower] = [DnsWorkers(name, client, dns_interval_s) for name in names]
    if path:
        followers.append(WorkersFile(path, client))
    if service.snapshots:
        followers.append(service.snapshots)
    return followers


def _tls_to_itself(options: ServeOptions) -> ssl.SSLContext | None:
    """Trusts the service's own certificate alone, which need not be for the address that it is asked at."""
    if not options.tls_cert:
        return None
    context = ssl.create_default_context(cafile=options.tls_cert)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # the leaf is in the file, its authority perhaps not
    return context


def _wait(signals: set[signal.Signals], followers: list[_Follower]) -> None:
    """Until a signal; meanwhile follows what may change."""
    while True:
        for follower in followers:
            follower.follow()
        if signal.sigtimedwait(signals, 1.0) is not None:
            return
