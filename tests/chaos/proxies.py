"""TCP proxies between router and workers, which can cut, hold back, delay and garble, and lose single ZMQ messages.

They stand where a network would: a kernel without ``sch_netem`` cannot lose packets on a loopback device, and TCP would
hide the loss from ZMQ anyway, as time (``held``) or as a dead connection (``cut``).
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from dataclasses import dataclass

from chaos.zmtp import GREETING_BYTES, MessageSplitter

_CHUNK = 1 << 16
_KEPT_BACK_S = 0.2
_ZMTP = b"\xff" + bytes(7) + b"\x01\x7f\x03\x01"  # the beginning of a greeting
_STRANGERS = [
    b"",
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 200\r\n\r\n",
    _ZMTP + b"PLAIN".ljust(52, b"\0"),
    _ZMTP + b"NULL".ljust(52, b"\0") + b"\x04\x19\x05READY\x0bSocket-Type\0\0\0\x03REP",
]
"""What programs that are no workers say to who connects to their port; noise follows."""


@dataclass
class MessageFaults:
    """What happens to a ZMQ message on its way to the router; each is a share of all, 0 to 1."""

    lost: float = 0.0
    doubled: float = 0.0
    swapped: float = 0.0
    """With the message after it, if one comes soon."""
    lose_next: int = 0
    """So many messages are lost, whatever ``lost`` says."""


class Link:
    """One listener in front of one port of a worker."""

    def __init__(self, port: int, target: int, rng: random.Random, messages: bool = False) -> None:
        self.port = port
        self.target = target
        self.faults = MessageFaults()
        self.delay_s = 0.0
        self.garbage = False
        self.messages_lost = 0
        self._messages = messages
        self.rng = rng
        self._server: asyncio.Server | None = None
        self._open = asyncio.Event()
        self._open.set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def listen(self) -> None:
        """Takes connections (again)."""
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, reuse_address=True)

    def cut(self) -> None:
        """Resets all connections and refuses new ones, until ``listen``."""
        if self._server is not None:
            self._server.close()
            self._server = None
        self.reset()

    def reset(self) -> None:
        """Resets all connections."""
        for writer in list(self._writers):
            writer.transport.abort()

    def hold(self) -> None:
        """Nothing passes, in either direction, and nobody is told, until ``release``."""
        self._open.clear()

    def release(self) -> None:
        """What was held back passes."""
        self._open.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            if self.garbage:
                writer.write(self.rng.choice(_STRANGERS) + self.rng.randbytes(200))
                await writer.drain()
                return
            away_reader, away = await asyncio.open_connection("127.0.0.1", self.target)
            self._writers.add(away)
            try:
                pumps = [self._pump(reader, away, False), self._pump(away_reader, writer, self._messages)]
                tasks = [asyncio.ensure_future(pump) for pump in pumps]
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            finally:
                self._writers.discard(away)
                away.close()
        except OSError:
            pass  # the worker is not there: the connection is closed, as the kernel would refuse it
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, messages: bool) -> None:
        lossy = _LossyPath(self) if messages else None
        with contextlib.suppress(OSError):
            while True:
                try:
                    waits = lossy is not None and lossy.keeps_back
                    data = await asyncio.wait_for(reader.read(_CHUNK), _KEPT_BACK_S if waits else None)
                except asyncio.TimeoutError:
                    assert lossy is not None
                    writer.write(lossy.flush())
                    continue
                if not data:
                    return
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                await self._open.wait()
                writer.write(lossy.through(data) if lossy else data)
                await writer.drain()


class _LossyPath:
    """The way of one connection's messages to the subscriber, on which the link's faults befall them."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._splitter = MessageSplitter()
        self._greeted = 0
        self._kept_back = b""

    @property
    def keeps_back(self) -> bool:
        """Whether a message waits to change places with the next."""
        return bool(self._kept_back)

    def flush(self) -> bytes:
        """The message that waits."""
        waiting, self._kept_back = self._kept_back, b""
        return waiting

    def through(self, data: bytes) -> bytes:
        """What comes out of the other end for ``data``."""
        # Of the greeting every piece at once: either side waits for the beginning of the other's.
        head = data[: GREETING_BYTES - self._greeted]
        self._greeted += len(head)
        parts = self._splitter.feed(data[len(head) :])
        return head + b"".join(self._fate(part) if is_message else part for is_message, part in parts)

    def _fate(self, message: bytes) -> bytes:
        faults = self._link.faults
        draw = self._link.rng.random()
        if faults.lose_next or draw < faults.lost:
            faults.lose_next = max(faults.lose_next - 1, 0)
            self._link.messages_lost += 1
            return b""
        if draw < faults.lost + faults.doubled:
            return message + message + self.flush()
        if not self._kept_back and draw < faults.lost + faults.doubled + faults.swapped:
            self._kept_back = message
            return b""
        return message + self.flush()
