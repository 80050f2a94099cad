"""``kvrouter doctor``: what keeps a worker from being routed to well, and the setting that mends it."""

from __future__ import annotations

import itertools
import re
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from kvrouter.bench.local_http import HttpError
from kvrouter.service_client import ServiceClient, read_token
from kvrouter.worker_spec import WorkerSpec

_PROBE_BLOCKS = 3
_CLOCK_TOLERANCE_S = 5.0
_LITTLE_TRAFFIC = 50
_CONFIG = re.compile(r"^vllm:cache_config_info\{(.*)\} ", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    ok: True, False, or None where it could not be told.
    help: the setting that mends it; empty where there is nothing to mend.
    """

    subject: str
    ok: bool | None
    text: str
    help: str = ""


def examine_worker(
    worker: WorkerSpec, block_size: int | None, wait_s: float, probe: bool, ca_file: Path | None = None
) -> Iterator[Finding]:
    """The findings on one worker, in the order in which they depend on each other.

    block_size: the router's, in tokens; None: whatever the worker says is right.
    wait_s: how long to wait for its messages.
    probe: send it a prompt of a few blocks, so that it has something to publish.
    ca_file: whom to trust where its URL is https; None: the system's authorities.
    """
    name = worker.url
    server = ServiceClient(worker.url, "", ca_file)
    try:
        server.text("GET", "/health")
    except HttpError as error:
        yield Finding(name, False, f"does not answer: {error}", _unreachable_help(worker.url))
        return
    yield Finding(name, True, "answers /health")
    config = _cache_config(server)
    told = config.get("block_size", "")
    size = int(told) if re.fullmatch(r"[0-9]{1,6}", told) else 0
    yield from _examine_config(name, config, size, block_size)
    engines = worker.ranks()
    for rank, engine in enumerate(engines):
        who = name if len(engines) == 1 else f"{name} rank {rank}"
        asked = rank if worker.data_parallel_size else None
        send = partial(_send_probe, server, size or block_size or 64, asked) if probe else None
        yield from _examine_load(who, engine, wait_s)
        yield from _examine_events(who, engine, wait_s, send)


def _unreachable_help(url: str) -> str:
    from kvrouter.vllm.ports import port_holder

    parts = urlsplit(url)
    if parts.hostname not in ("localhost", "127.0.0.1", "::1"):
        return "start it there with vllm serve --host 0.0.0.0, or correct the address in --worker"
    holder = port_holder(parts.port or 80)
    if holder:
        return f"port {parts.port} belongs to {holder}, which is no healthy vLLM server: stop that, or change --port"
    return f"nothing listens on port {parts.port}: start vllm serve --port {parts.port}, or correct --worker"


def _cache_config(server: ServiceClient) -> dict[str, str]:
    try:
        page = server.text("GET", "/metrics")
    except HttpError:
        return {}
    match = _CONFIG.search(page)
    return dict(_LABEL.findall(match[1])) if match else {}


def _examine_config(name: str, config: dict[str, str], size: int, wanted: int | None) -> Iterator[Finding]:
    if not size:
        yield Finding(
            name,
            None,
            "does not tell its block size on /metrics, as vLLM does",
            "the backend has to be vLLM (policy.generation.backend=vllm), started without --disable-log-stats",
        )
    elif wanted and size != wanted:
        yield Finding(
            name,
            False,
            f"has KV blocks of {size} tokens, the router of {wanted}",
            f"start vLLM with --block-size {wanted}, or the router with --block-size {size}",
        )
    else:
        yield Finding(name, True, f"has KV blocks of {size} tokens")
    caching = config.get("enable_prefix_caching")
    if caching == "False":
        yield Finding(name, False, "has prefix caching off", "start vLLM with --enable-prefix-caching")
    elif caching == "True":
        yield Finding(name, True, "has prefix caching on")


def _examine_load(name: str, worker: WorkerSpec, wait_s: float) -> Iterator[Finding]:
    if not worker.load:
        yield Finding(name, None, "has no load endpoint: its load is read from /metrics, four times a second")
        return
    message = next(_messages(worker.load, wait_s), None)
    if message is None:
        yield Finding(
            name,
            False,
            f"publishes no load at {worker.load}",
            "install kvrouter beside vLLM and set KVROUTER_LOAD_ENDPOINT, or leave load= out",
        )
    else:
        yield Finding(name, True, "publishes its load")


def _examine_events(
    name: str, worker: WorkerSpec, wait_s: float, send_probe: Callable[[], None] | None
) -> Iterator[Finding]:
    if not worker.kv_events:
        yield Finding(
            name,
            False,
            "has no KV-event endpoint: it is routed to by its load alone",
            "start vLLM with --kv-events-config (kvrouter.vllm.kv_events_config gives it) and give kv_events=",
        )
        return
    received = list(_messages(worker.kv_events, wait_s, send_probe, 50))
    batches = [parts for parts in received if len(parts) == 3 and len(parts[1]) == 8]
    if not batches:
        listening = _holder_text(worker.kv_events)
        yield Finding(
            name,
            False if send_probe else None,
            f"published no KV events at {worker.kv_events} within {wait_s:g} s{listening}",
            'set "enable_kv_cache_events": true and this endpoint in --kv-events-config, and prefix caching on',
        )
        return
    sequence = [int.from_bytes(parts[1], "big") for parts in batches]
    in_order = all(later == earlier + 1 for earlier, later in itertools.pairwise(sequence))
    yield Finding(
        name,
        in_order,
        f"published {len(batches)} batches of KV events, " + ("in order" if in_order else f"out of order: {sequence}"),
        "" if in_order else "let one vLLM server alone publish on this endpoint",
    )
    yield _examine_clock(name, batches[-1][2])


def _examine_clock(name: str, payload: bytes) -> Finding:
    # A batch is a MessagePack array whose first entry is a float64 of seconds since 1970.
    if len(payload) < 10 or payload[1] != 0xCB:
        return Finding(name, None, "sends events without a time")
    skew = time.time() - struct.unpack(">d", payload[2:10])[0]
    if abs(skew) <= _CLOCK_TOLERANCE_S:
        return Finding(name, True, f"has a clock within {_CLOCK_TOLERANCE_S:g} s of this machine's")
    return Finding(name, False, f"has a clock {skew:+.0f} s from this machine's", "run a time service (NTP) on both")


def _holder_text(endpoint: str) -> str:
    from kvrouter.vllm.ports import port_holder

    match = re.fullmatch(r"tcp://(localhost|127\.0\.0\.1):(\d+)", endpoint)
    if not match:
        return ""
    holder = port_holder(int(match[2]))
    return f" (port {match[2]} belongs to {holder})" if holder else f" (nothing listens on port {match[2]})"


def _messages(
    endpoint: str, wait_s: float, prompt: Callable[[], None] | None = None, most: int = 1
) -> Iterator[list[bytes]]:
    """What is published within ``wait_s`` seconds; ends half a second after the last message."""
    import zmq

    with zmq.Context() as context, context.socket(zmq.SUB) as subscriber:
        subscriber.setsockopt(zmq.LINGER, 0)
        subscriber.setsockopt(zmq.SUBSCRIBE, b"")
        subscriber.connect(endpoint)
        deadline = time.monotonic() + wait_s
        if prompt:
            time.sleep(0.3)  # the subscription has to arrive before what it is for
            prompt()
        for _ in range(most):
            if not subscriber.poll(int(max(0.0, deadline - time.monotonic()) * 1000)):
                return
            yield subscriber.recv_multipart()
            deadline = min(deadline, time.monotonic() + 0.5)


def _send_probe(server: ServiceClient, size: int, rank: int | None) -> None:
    """A prompt that no one has sent before, of a few blocks; what becomes of it shows in the events."""
    start = 3 + time.time_ns() % 200
    tokens = [start + i % 17 for i in range(_PROBE_BLOCKS * size + 1)]
    headers = {} if rank is None else {"X-data-parallel-rank": str(rank)}
    try:
        model = server.json("GET", "/v1/models")["data"][0]["id"]
        server.text("POST", "/v1/completions", {"model": model, "prompt": tokens, "max_tokens": 1}, 60, headers)
    except (HttpError, LookupError, TypeError):
        return


def examine_service(service: ServiceClient, expected_workers: int | None) -> Iterator[Finding]:
    """The findings on a running ``kvrouter serve``: its workers, and what its traffic shows."""
    url = service.url
    try:
        status = service.workers()
    except HttpError as error:
        yield Finding(url, False, f"does not answer: {error}", "start kvrouter serve, or correct --router-url")
        return
    workers = status["workers"]
    if expected_workers is not None and len(workers) != expected_workers:
        yield Finding(
            url,
            False,
            f"has {len(workers)} workers, not {expected_workers}",
            "give each a --worker, or POST /workers (num_workers of a KvRouter)",
        )
    for worker in workers:
        name = f"{url} worker {worker['worker_id']}"
        if not worker["healthy"]:
            yield Finding(name, False, f"cannot be reached: {worker['health_error']}", "see the worker's own findings")
        if worker["gaps"]:
            yield Finding(
                name,
                False,
                f"lost {worker['missed_batches']} batches of KV events in {worker['gaps']} gaps",
                'raise "hwm" and "buffer_steps" in --kv-events-config, or give the router more CPU',
            )
        if worker["block_size"] not in (0, status["block_size"]):
            yield Finding(
                name,
                False,
                f"has KV blocks of {worker['block_size']} tokens, the router of {status['block_size']}",
                "set --block-size of both to the same",
            )
    yield _examine_traffic(url, workers, status)


def _examine_traffic(url: str, workers: list[dict[str, Any]], status: dict[str, Any]) -> Finding:
    decisions = status["decisions"]
    if decisions < _LITTLE_TRAFFIC:
        return Finding(url, None, f"has decided {decisions} times: too few to judge by; caches are still warming up")
    queries = sum(worker["prefix_cache_queries"] for worker in workers)
    hits = sum(worker["prefix_cache_hits"] for worker in workers)
    if queries and hits / queries < 0.02:
        return Finding(
            url,
            False,
            f"finds {100 * hits / queries:.1f}% of prompt tokens in the workers' caches",
            "requests share no whole blocks: put what they share first, or lower --block-size of vLLM",
        )
    share = 100 * hits / queries if queries else 0.0
    return Finding(url, True, f"finds {share:.1f}% of prompt tokens in the workers' caches")


def doctor(
    worker: Annotated[list[str] | None, typer.Option(help="As for kvrouter serve; one option a worker.")] = None,
    router_url: Annotated[str, typer.Option(help="A running kvrouter serve, to examine as well.")] = "",
    block_size: Annotated[int | None, typer.Option(help="Tokens a KV block, as the router has it.", min=1)] = None,
    num_workers: Annotated[int | None, typer.Option(help="How many workers the router should have.", min=1)] = None,
    wait: Annotated[float, typer.Option(help="Seconds to wait for a worker's messages.", min=0.1)] = 5.0,
    probe: Annotated[bool, typer.Option(help="Send each worker a short prompt.")] = True,
    api_token_file: Annotated[Path | None, typer.Option(help="File with the service's bearer token.")] = None,
    ca_file: Annotated[
        Path | None, typer.Option(help="PEM file of whom to trust for https; default: the system's.")
    ] = (None),
) -> None:
    """Examine workers, and a running service; exit status 1 when something is to be mended."""
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False)
    try:
        specs = [WorkerSpec.parse(text) for text in worker or []]
        service = ServiceClient(router_url, read_token(api_token_file), ca_file) if router_url else None
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
    if not specs and not router_url:
        raise typer.BadParameter("give a --worker or --router-url to examine")
    bad = 0
    for finding in _all_findings(specs, service, block_size, num_workers, wait, probe, ca_file):
        mark, style = {True: ("ok", "green"), False: ("!!", "bold red"), None: ("? ", "yellow")}[finding.ok]
        console.print(f"[{style}]{mark}[/]", end=" ")
        console.print(f"{finding.subject} {finding.text}", markup=False)
        if finding.help and finding.ok is not True:
            console.print(f"      {finding.help}", markup=False)
        bad += finding.ok is False
    if bad:
        raise typer.Exit(1)


def _all_findings(
    specs: list[WorkerSpec],
    service: ServiceClient | None,
    block_size: int | None,
    num_workers: int | None,
    wait_s: float,
    probe: bool,
    ca_file: Path | None,
) -> Iterator[Finding]:
    for spec in specs:
        yield from examine_worker(spec, block_size, wait_s, probe, ca_file)
    if service:
        yield from examine_service(service, num_workers)
