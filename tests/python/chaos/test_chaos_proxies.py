"""The proxies of tests/chaos do to a connection what they say, and nothing else."""

from __future__ import annotations

import asyncio
import random

import pytest
import zmq
import zmq.asyncio
from hypothesis import given
from hypothesis import strategies as st

from chaos.fleet import free_ports
from chaos.proxies import Link, MessageFaults
from chaos.zmtp import MessageSplitter


def frame(body: bytes, flags: int) -> bytes:
    if len(body) > 255:
        return bytes([flags | 2]) + len(body).to_bytes(8, "big") + body
    return bytes([flags, len(body)]) + body


@given(
    st.lists(st.one_of(st.just(None), st.lists(st.binary(max_size=300), min_size=1, max_size=3)), max_size=6),
    st.integers(1, 50),
)
def test_splitter_finds_messages_wherever_the_bytes_are_cut(parts, piece):
    expected = []
    for part in parts:
        if part is None:
            expected.append((False, frame(b"\4PING", 4)))
        else:
            frames = [frame(body, 1) for body in part[:-1]] + [frame(part[-1], 0)]
            expected.append((True, b"".join(frames)))
    sent = b"".join(data for _, data in expected)
    splitter = MessageSplitter()
    found = [out for at in range(0, len(sent), piece) for out in splitter.feed(sent[at : at + piece])]
    assert found == expected


@pytest.fixture
async def subscription():
    """A publisher, a link in front of it, and a subscriber behind the link that hears it."""
    context = zmq.asyncio.Context()
    publisher, subscriber = context.socket(zmq.PUB), context.socket(zmq.SUB)
    target = publisher.bind_to_random_port("tcp://127.0.0.1")
    link = Link(free_ports(1)[0], target, random.Random(1), messages=True)
    await link.listen()
    subscriber.setsockopt(zmq.SUBSCRIBE, b"")
    subscriber.setsockopt(zmq.RECONNECT_IVL, 20)
    subscriber.connect(f"tcp://127.0.0.1:{link.port}")
    await hear(publisher, subscriber)
    yield publisher, subscriber, link
    link.cut()
    context.destroy(linger=0)


async def hear(publisher: zmq.asyncio.Socket, subscriber: zmq.asyncio.Socket) -> None:
    """Until a message gets through, and those before it are read."""
    for number in range(500):
        mark = b"mark %d" % number
        await publisher.send(mark)
        while await subscriber.poll(20):
            if await subscriber.recv() == mark:
                return
    raise AssertionError("the subscriber never heard the publisher")


async def exchange(publisher: zmq.asyncio.Socket, subscriber: zmq.asyncio.Socket, count: int) -> list[int]:
    """The numbers heard of the ``count`` sent, up to an end mark, which is sent until it is heard."""
    for number in range(count):
        await publisher.send_multipart([b"kv", number.to_bytes(8, "big"), b"x" * 300])
    heard = []
    while True:
        await publisher.send(b"end")
        while await subscriber.poll(50):
            message = await subscriber.recv_multipart()
            if message == [b"end"]:
                return heard
            if len(message) == 3:
                heard.append(int.from_bytes(message[1], "big"))


async def test_without_faults_all_messages_pass_in_order(subscription):
    publisher, subscriber, _ = subscription
    assert await exchange(publisher, subscriber, 200) == list(range(200))


async def test_one_message_is_lost_and_the_connection_stays(subscription):
    publisher, subscriber, link = subscription
    link.faults.lose_next = 1
    assert await exchange(publisher, subscriber, 50) == list(range(1, 50))
    assert link.messages_lost == 1


async def test_doubled_and_swapped_messages_are_all_there(subscription):
    publisher, subscriber, link = subscription
    link.faults = MessageFaults(doubled=0.3)
    doubled = await exchange(publisher, subscriber, 100)
    assert sorted(set(doubled)) == list(range(100)) and len(doubled) > 100
    link.faults = MessageFaults(swapped=0.3)
    swapped = await exchange(publisher, subscriber, 100)
    assert sorted(swapped) == list(range(100)) and swapped != sorted(swapped)


async def test_what_is_held_comes_when_released_and_a_cut_link_comes_back(subscription):
    publisher, subscriber, link = subscription
    link.hold()
    await publisher.send(b"held")
    assert not await subscriber.poll(100)
    link.release()
    assert await asyncio.wait_for(subscriber.recv(), 10) == b"held"
    link.cut()
    with pytest.raises(OSError):
        await asyncio.open_connection("127.0.0.1", link.port)
    await link.listen()
    await hear(publisher, subscriber)
