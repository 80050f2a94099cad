from __future__ import annotations

import asyncio
import contextlib
import socket
import time

import pytest
from aiohttp import web
from bench_support import Server

from kvrouter.bench.local_http import HttpError, http_json, http_request
from kvrouter.bench.router_process import RouterAdmin, RouterProcess, free_port
from kvrouter.bench.runner import run_benchmark
from kvrouter.bench.settings import BenchSettings, EngineName


class Api(Server):
    """The admin side of a router whose worker has had `events(n)` KV events when it is looked at for the n-th time."""

    def __init__(self, events=lambda _: 0) -> None:
        super().__init__()
        self.looks = 0
        self.resets = 0
        self.events = events
        self.app.router.add_get("/workers", self._workers)
        self.app.router.add_post("/reset", self._reset)
        self.app.router.add_get("/refuse", self._refuse)
        self.app.router.add_get("/text", self._text)

    async def _workers(self, _: web.Request) -> web.Response:
        self.looks += 1
        return web.json_response({"workers": [{"worker_id": 0, "events": self.events(self.looks - 1)}]})

    async def _refuse(self, _: web.Request) -> web.Response:
        return web.json_response({"detail": "because"}, status=400)

    async def _text(self, _: web.Request) -> web.Response:
        return web.Response(text="not json")

    async def _reset(self, _: web.Request) -> web.Response:
        self.resets += 1
        return web.json_response({})


@contextlib.asynccontextmanager
async def admin_of(api: Api):
    async with api:
        yield RouterAdmin(api.url)


async def test_settle_waits_until_no_more_events_come():
    async with admin_of(Api(lambda look: min(look, 12))) as admin:
        assert await asyncio.to_thread(admin.settle, quiet_s=0.05)
        assert await asyncio.to_thread(admin.events) == [12]


async def test_settle_gives_up_on_events_that_never_end():
    async with admin_of(Api(lambda look: look)) as admin:
        start = time.monotonic()
        assert not await asyncio.to_thread(admin.settle, timeout_s=0.3)
        assert 0.3 <= time.monotonic() - start < 2.0


async def test_reset_is_a_post():
    api = Api()
    async with admin_of(api) as admin:
        await asyncio.to_thread(admin.reset)
    assert api.resets == 1


async def test_router_without_health_is_not_healthy():
    async with admin_of(Api()) as admin:
        assert not await asyncio.to_thread(admin.healthy)


async def test_http_errors_name_the_url_and_the_reason():
    async with Api() as api:
        with pytest.raises(HttpError, match=r"/refuse answered 400: .*because"):
            await asyncio.to_thread(http_request, f"{api.url}/refuse")
        with pytest.raises(HttpError, match=r"/text did not answer with JSON"):
            await asyncio.to_thread(http_json, f"{api.url}/text")
    with pytest.raises(HttpError, match=api.url):
        http_request(f"{api.url}/workers")
    with pytest.raises(HttpError, match="nonsense"):
        http_request("nonsense")


def process(**options) -> RouterProcess:
    defaults = {
        "host": "127.0.0.1",
        "port": 0,
        "block_size": 64,
        "kv_events_ports": [free_port("127.0.0.1")],
        "metrics_ports": [free_port("127.0.0.1")],
        "worker_urls": [f"http://127.0.0.1:{free_port('127.0.0.1')}"],
        "policy": "linear",
        "seed": 0,
    }
    return RouterProcess(**{**defaults, **options})


def test_router_process_starts_serves_and_is_gone():
    with process() as router:
        pid = router.pid
        assert pid is not None
        (worker,) = router.admin.workers()["workers"]
        assert (worker["worker_id"], worker["events"]) == (0, 0)
        router.admin.reset()
    assert router.pid is None
    with pytest.raises(HttpError):
        router.admin.workers()
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind((router.host, router.port))


def test_router_process_that_cannot_start_says_why(tmp_path):
    with (
        pytest.raises(RuntimeError, match=r"(?s)ended with status \d.*no-such-policy"),
        process(policy="no-such-policy", log_dir=tmp_path),
    ):
        pass
    assert "no-such-policy" in (tmp_path / "router.log").read_text()


def test_ports_with_holes_are_refused():
    with pytest.raises(ValueError, match="KV-events ports"):
        process(kv_events_ports=[5557, 5559], metrics_ports=[5657, 5658])


@pytest.mark.parametrize(
    ("options", "flag"), [({"policy": "no-such-policy"}, "--policy"), ({"num_workers": 1}, "--num-workers")]
)
def test_what_cannot_run_is_refused_before_workers_start(options, flag):
    start = time.monotonic()
    with pytest.raises(ValueError, match=flag):
        run_benchmark(BenchSettings(engine=EngineName.VLLM, **options))
    assert time.monotonic() - start < 5
