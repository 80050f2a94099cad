from __future__ import annotations

import asyncio
import contextlib
import logging

import pytest
from bench_support import BLOCK_SIZE, Router, Worker, plain_hasher, request

from kvrouter.bench import client as client_module
from kvrouter.bench.client import BenchClient, RequestRefusedError, WorkerFailedError
from kvrouter.bench.router_process import free_port


@contextlib.asynccontextmanager
async def bench(router: Router, *workers: Worker, dead: int = 0, **options):
    """A client before running servers; the last `dead` workers are ports where nobody listens."""
    async with contextlib.AsyncExitStack() as stack:
        for server in (router, *workers):
            await stack.enter_async_context(server)
        urls = [worker.url for worker in workers]
        urls += [f"http://127.0.0.1:{free_port('127.0.0.1')}" for _ in range(dead)]
        client = BenchClient(
            router.url, urls, block_size=BLOCK_SIZE, model="m", hasher=plain_hasher, router_timeout_s=5.0, **options
        )
        yield await stack.enter_async_context(client)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [entry.getMessage() for entry in caplog.records if entry.levelno >= logging.WARNING]


@pytest.fixture(autouse=True)
def propagate(monkeypatch):
    """The command line takes the package's log to its own handler; here caplog wants it."""
    monkeypatch.setattr(logging.getLogger("kvrouter"), "propagate", True)


async def test_request_goes_to_the_chosen_worker_and_is_recorded():
    router = Router(lambda _: {"worker_id": 1, "overlap_blocks": 1})
    workers = Worker(), Worker(cached_tokens=4)
    async with bench(router, *workers) as client:
        (record,) = await client.run([request(num_tokens=10)], "kv_aware", concurrency=1)
    assert router.paths == ["/find_best_worker"]
    assert router.bodies == [{"local_hashes": [3 + 4 + 5 + 6, 7 + 8 + 9 + 10], "num_tokens": 10}]
    assert not workers[0].bodies
    (body,) = workers[1].bodies
    assert body["prompt"] == list(range(3, 13))
    assert body["stream"] and body["ignore_eos"] and body["stream_options"] == {"include_usage": True}
    assert (body["max_tokens"], body["temperature"], body["seed"], body["model"]) == (3, 0.0, 7, "m")
    assert (record.worker, record.predicted_blocks, record.cached_tokens) == (1, 1, 4)
    assert (record.prompt_tokens, record.completion_tokens, record.attempts, record.error) == (10, 3, 1, None)
    assert 0 < record.hash_us < record.router_us < record.ttft_ms * 1e3 <= record.latency_ms * 1e3


async def test_round_robin_asks_the_round_robin_endpoint():
    router = Router(lambda n: {"worker_id": n % 2})
    workers = Worker(), Worker()
    async with bench(router, *workers) as client:
        records = await client.run([request(i) for i in range(6)], "round_robin", concurrency=1)
    assert set(router.paths) == {"/find_worker_round_robin"}
    assert [record.worker for record in records] == [0, 1] * 3
    assert [record.predicted_blocks for record in records] == [None] * 6


async def test_time_to_first_token_is_of_the_first_token():
    worker = Worker()
    worker.first_token_delay_s = 0.1
    async with bench(Router(lambda _: {"worker_id": 0}), worker) as client:
        (record,) = await client.run([request()], "kv_aware", concurrency=1)
    assert 100 <= record.ttft_ms <= record.latency_ms


@pytest.mark.parametrize("concurrency", [1, 3])
async def test_as_many_requests_are_under_way_as_there_are_users(concurrency):
    worker = Worker()
    worker.first_token_delay_s = 0.01
    seen = []
    async with bench(Router(lambda _: {"worker_id": 0}), worker) as client:
        records = await client.run(
            [request(i) for i in range(12)], "kv_aware", concurrency=concurrency, on_done=seen.append
        )
    assert worker.most_running == concurrency
    assert [record.index for record in records] == list(range(12))
    assert sorted(record.index for record in seen) == list(range(12))


@pytest.mark.parametrize("fault", ["reset", "reset mid-stream", "500", "error in stream", "garbage", "ends early"])
async def test_worker_that_fails_is_warned_of_once_and_its_requests_go_on(fault, caplog):
    bad, good = Worker(fault=lambda _: fault), Worker()
    router = Router(lambda _: {"worker_id": 0, "overlap_blocks": 2})
    async with bench(router, bad, good) as client:
        records = await client.run([request(i) for i in range(8)], "kv_aware", concurrency=2)
    assert [record.worker for record in records] == [1] * 8
    assert [record.error for record in records] == [None] * 8
    assert all(record.predicted_blocks is None for record in records), "what was predicted for another worker"
    assert 1 <= sum(record.attempts == 2 for record in records) <= 2, "only what was under way tries it again"
    (warning,) = warnings_of(caplog)
    assert "worker 0" in warning and bad.url in warning


async def test_worker_where_nobody_listens_is_warned_of_once(caplog):
    good = Worker()
    async with bench(Router(lambda n: {"worker_id": n % 2}), good, dead=1) as client:
        records = await client.run([request(i) for i in range(20)], "round_robin", concurrency=4)
    assert [record.worker for record in records] == [0] * 20
    (warning,) = warnings_of(caplog)
    assert "worker 1" in warning and "cannot connect" in warning


async def test_worker_that_hangs_counts_as_failed(caplog):
    async with bench(
        Router(lambda _: {"worker_id": 0}), Worker(fault=lambda _: "hang"), Worker(), request_timeout_s=0.2
    ) as client:
        (record,) = await client.run([request()], "kv_aware", concurrency=1)
    assert (record.worker, record.attempts) == (1, 2)
    assert "no answer in time" in warnings_of(caplog)[0]


async def test_worker_is_used_again_when_it_answers_again(caplog, monkeypatch):
    monkeypatch.setattr(client_module, "COOL_DOWN_S", 0.05)
    flaky, good = Worker(fault=lambda n: "500" if n < 2 else None), Worker()
    async with bench(Router(lambda _: {"worker_id": 0}), flaky, good) as client:
        workers = []
        for index in range(4):
            (record,) = await client.run([request(index)], "kv_aware", concurrency=1)
            workers.append(record.worker)
            await asyncio.sleep(0.06)
    assert workers == [1, 1, 0, 0]
    failed, again = warnings_of(caplog)
    assert "failed" in failed and "answers again" in again


async def test_no_worker_answers_is_an_error_of_the_request(caplog):
    async with bench(Router(lambda _: {"worker_id": 0}), Worker(fault=lambda _: "500"), dead=1) as client:
        records = await client.run([request(i) for i in range(3)], "kv_aware", concurrency=1)
    for record in records:
        assert (record.worker, record.attempts, record.ttft_ms) == (None, 2, None)
        assert record.error is not None
    assert len(warnings_of(caplog)) == 2


async def test_refused_request_is_not_tried_elsewhere(caplog):
    bad, other = Worker(fault=lambda _: "400"), Worker()
    async with bench(Router(lambda _: {"worker_id": 0}), bad, other) as client:
        (record,) = await client.run([request()], "kv_aware", concurrency=1)
    assert record.worker is None
    assert "so it is" in record.error
    assert not other.bodies and not warnings_of(caplog)


@pytest.mark.parametrize(
    "answer",
    [
        500,
        "not json",
        "[]",
        {"worker_id": 2},
        {"worker_id": -1},
        {"worker_id": "0"},
        {"worker_id": None},
        {"worker_id": 0, "overlap_blocks": 3},
        {"worker_id": 0, "overlap_blocks": -1},
        {"worker_id": 0, "overlap_blocks": "1"},
        {},
    ],
    ids=str,
)
async def test_router_that_answers_nonsense_is_done_without(answer, caplog):
    workers = Worker(), Worker()
    router = Router(lambda _: answer)
    async with bench(router, *workers) as client:
        records = await client.run([request(i) for i in range(6)], "kv_aware", concurrency=1)
    assert [record.worker for record in records] == [0, 1] * 3
    assert all(record.router_us is None and record.error is None for record in records)
    assert len(router.bodies) == 1, "it is left alone for a while"
    (warning,) = warnings_of(caplog)
    assert "round robin" in warning and router.url in warning


async def test_router_that_is_gone_is_done_without_until_it_is_back(caplog, monkeypatch):
    monkeypatch.setattr(client_module, "COOL_DOWN_S", 0.05)
    router = Router(lambda n: 500 if n == 0 else {"worker_id": 0})
    async with bench(router, Worker(), Worker()) as client:
        first = await client.run([request(i) for i in range(4)], "kv_aware", concurrency=1)
        await asyncio.sleep(0.06)
        second = await client.run([request(i) for i in range(4)], "kv_aware", concurrency=1)
    assert all(record.router_us is None for record in first)
    assert all(record.router_us is not None and record.worker == 0 for record in second)
    assert len(warnings_of(caplog)) == 2


async def test_router_that_hangs_costs_its_timeout_once(caplog):
    router = Router(lambda _: "hang")
    async with router, Worker() as worker:
        client = BenchClient(
            router.url, [worker.url], block_size=4, model="m", hasher=plain_hasher, router_timeout_s=0.2
        )
        async with client:
            records = await client.run([request(i) for i in range(10)], "kv_aware", concurrency=1)
    assert sum(record.ttft_ms >= 200 for record in records) == 1
    assert "no answer in time" in warnings_of(caplog)[0]


async def test_worker_that_reports_no_cached_tokens_is_no_failure():
    async with bench(Router(lambda _: {"worker_id": 0}), Worker(cached_tokens=None)) as client:
        (record,) = await client.run([request()], "kv_aware", concurrency=1)
    assert (record.worker, record.cached_tokens, record.completion_tokens) == (0, None, 3)


async def test_warming_up_says_which_way_it_failed():
    fault = iter(["500", "400"])
    async with bench(Router(lambda _: {}), Worker(fault=lambda _: next(fault))) as client:
        with pytest.raises(WorkerFailedError):
            await client.send_to(0, request())
        with pytest.raises(RequestRefusedError):
            await client.send_to(0, request())


async def test_cancelling_a_run_leaves_no_user_behind():
    async with bench(Router(lambda _: {"worker_id": 0}), Worker(fault=lambda _: "hang")) as client:
        run = asyncio.create_task(client.run([request(i) for i in range(4)], "kv_aware", concurrency=4))
        await asyncio.sleep(0.1)
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        assert not [task for task in asyncio.all_tasks() if "run.<locals>.user" in repr(task.get_coro())]
