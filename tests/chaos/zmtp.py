"""The frames of a ZMTP 3 connection, cut into messages: so that a proxy can lose one of them.

A connection begins with 64 bytes of greeting; then come frames: a byte of flags, a length of 1 or 8 bytes, a body.
Commands (handshake, heartbeats, subscriptions) are frames of their own and are none of a proxy's business.
"""

from __future__ import annotations

from collections.abc import Iterator

GREETING_BYTES = 64
_MORE, _LONG, _COMMAND = 1, 2, 4


class MessageSplitter:
    """The bytes after the greeting in, as they come; out come (is_message, bytes): whole messages, and what is none."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._message = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[bool, bytes]]:
        """What is whole now."""
        self._buffer += data
        while (size := self._frame_size()) is not None:
            flags = self._buffer[0]
            frame = self._take(size)
            if flags & _COMMAND:
                yield False, frame
                continue
            self._message += frame
            if not flags & _MORE:
                message = bytes(self._message)
                self._message.clear()
                yield True, message

    def _frame_size(self) -> int | None:
        buffer = self._buffer
        if len(buffer) < 2:
            return None
        if buffer[0] & _LONG:
            if len(buffer) < 9:
                return None
            size = 9 + int.from_bytes(buffer[1:9], "big")
        else:
            size = 2 + buffer[1]
        return size if len(buffer) >= size else None

    def _take(self, size: int) -> bytes:
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken
