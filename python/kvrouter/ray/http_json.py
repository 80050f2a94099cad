"""JSON over a kept-alive HTTP connection."""

from __future__ import annotations

import weakref
from typing import Any

import aiohttp

from kvrouter.ray import background


class HttpJson:
    """Requests to one server, on the background loop; one over a connection that broke is sent again."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self._url = url
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._session: aiohttp.ClientSession | None = None

    async def post(self, path: str, body: Any) -> Any:
        """The answer's JSON.  Raises RuntimeError for an answer that is none, aiohttp.ClientError or TimeoutError."""
        return await self._request("POST", path, body)

    async def get(self, path: str) -> Any:
        """As ``post``."""
        return await self._request("GET", path, None)

    async def _request(self, method: str, path: str, body: Any) -> Any:
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=self._timeout)
            weakref.finalize(self, _close, self._session)
        for attempt in range(2):
            try:
                async with self._session.request(method, f"{self._url}{path}", json=body) as response:
                    if response.status != 200:
                        raise RuntimeError(f"{path}: HTTP {response.status}: {(await response.text())[:200]}")
                    return await response.json(content_type=None)
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
                if attempt:
                    raise
        raise AssertionError("unreachable")


def _close(session: aiohttp.ClientSession) -> None:
    background.spawn(session.close())
