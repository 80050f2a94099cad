"""Which server each conversation is at, what is in flight at each server, and when a conversation has to move."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass


@dataclass(frozen=True)
class Stickiness:
    """When a conversation stays where it is.

    A server is overloaded for a conversation that comes back when the requests in flight there, this one counted, are
    more than ``overload_ratio`` times the mean and exceed those at the idlest server by more than ``overload_slack``.

    sessions: conversations that are remembered; beyond that the one that was silent longest is forgotten.
    """

    overload_ratio: float = 1.5
    overload_slack: int = 8
    sessions: int = 10_000

    def __post_init__(self) -> None:
        if not self.overload_ratio >= 1:
            raise ValueError(f"overload_ratio must be at least 1, not {self.overload_ratio!r}")
        if self.overload_slack < 0:
            raise ValueError(f"overload_slack must not be negative, not {self.overload_slack!r}")
        if self.sessions < 1:
            raise ValueError(f"sessions must be at least 1, not {self.sessions!r}")


class Sessions:
    """Conversations and the servers they are at."""

    def __init__(self, stickiness: Stickiness) -> None:
        self._stickiness = stickiness
        self._server: OrderedDict[str, str] = OrderedDict()

    def home(self, session: str, in_flight: dict[str, int]) -> str | None:
        """The server that this conversation should go on at; None: it has none, or that is gone or overloaded.

        in_flight: requests at each server that there is.
        """
        server = self._server.get(session)
        if server is None or server not in in_flight:
            return None
        here = in_flight[server] + 1
        mean = (sum(in_flight.values()) + 1) / len(in_flight)
        gap = here - min(in_flight.values())
        overloaded = here > self._stickiness.overload_ratio * mean and gap > self._stickiness.overload_slack
        return None if overloaded else server

    def set(self, session: str, server: str) -> None:
        """The conversation is at this server from now on."""
        self._server[session] = server
        self._server.move_to_end(session)
        if len(self._server) > self._stickiness.sessions:
            self._server.popitem(last=False)

    def clear(self) -> int:
        """Forgets all; returns how many there were."""
        count = len(self._server)
        self._server.clear()
        return count
