"""The client of tests/chaos is strict: an answer that is not one, or not whole, does not pass for one."""

from __future__ import annotations

import json

import aiohttp
import pytest
from aiohttp import web

from chaos.answers import CutOffError, UnreadableError, read_answer
from chaos.ledger import Fate, Ledger
from chaos.workload import ExpectedOutput, Workload


def event(number: int, last: bool = False, identity: str = "a") -> str:
    choice = {"token_ids": [number], "finish_reason": "length" if last else None}
    return "data: " + json.dumps({"id": identity, "choices": [choice]}) + "\n\n"


DONE = "data: [DONE]\n\n"
ERROR = 'data: {"error": {"message": "broke off"}}\n\n'


async def read(text: str, status: int = 200, stream: bool = True):
    async def answer(_: web.Request) -> web.Response:
        return web.Response(text=text, status=status)

    app = web.Application()
    app.router.add_get("/", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        host, port = runner.addresses[0][:2]
        async with aiohttp.ClientSession() as session, session.get(f"http://{host}:{port}/") as response:
            return await read_answer(response, stream)
    finally:
        await runner.cleanup()


async def test_whole_stream_is_an_answer():
    assert (await read(event(5) + event(6, last=True) + DONE)).tokens == [5, 6]


async def test_stream_without_its_end_is_cut_off():
    with pytest.raises(CutOffError):
        await read(event(5))


@pytest.mark.parametrize(
    ("text", "status", "fate"),
    [
        (event(5) + ERROR, 200, Fate.REFUSED),
        (event(5) + event(5, identity="b") + DONE, 200, Fate.DUPLICATED),
        (event(5, last=True) + DONE + DONE, 200, Fate.DUPLICATED),
        ('{"error": {"message": "full"}}', 429, Fate.REFUSED),
        ("", 502, Fate.REFUSED),
        ("", 404, Fate.LOST),
    ],
)
async def test_other_fates(text, status, fate):
    with pytest.raises(UnreadableError) as caught:
        await read(text, status)
    assert caught.value.fate is fate


def test_ledger_takes_a_second_fate_for_a_duplicate():
    ledger = Ledger()
    ledger.enter(1, Fate.ANSWERED)
    ledger.enter(1, Fate.ANSWERED)
    assert ledger.count(Fate.DUPLICATED) == 1 and ledger.count(Fate.ANSWERED) == 0


def test_same_seed_same_requests_and_outputs():
    first, second = Workload(3, 16, 4), Workload(3, 16, 4)
    expected = ExpectedOutput()
    for _ in range(20):
        request = first.next()
        assert request == second.next()
        assert len(expected.of(request)) == request.max_tokens
