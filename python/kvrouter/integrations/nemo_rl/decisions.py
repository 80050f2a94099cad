"""Requests that a program makes at once are decided together."""

from __future__ import annotations

import asyncio
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt

from kvrouter.ray.router_handle import Choice, RouterHandle

_Waiting = list[tuple["npt.NDArray[np.int64]", "asyncio.Future[Choice | None]"]]


class DecisionsOfATurn:
    """Asks the router for all requests that came in one turn of an asyncio loop.

    NeMo-RL calls ``generate_async`` once for each sample, all samples of a step at once.  Decided one by one, the first
    samples of a prompt that nobody has cached yet would be spread; decided together they know of each other.
    May be used from several loops.
    """

    def __init__(self, router: RouterHandle) -> None:
        self._router = router
        self._waiting: weakref.WeakKeyDictionary[Any, _Waiting] = weakref.WeakKeyDictionary()
        self._tasks: set[asyncio.Task[None]] = set()

    async def choose(self, tokens: npt.NDArray[np.int64]) -> Choice | None:
        """The choice for a prompt of these token ids, int64, (n,); None when the router does not answer."""
        loop = asyncio.get_running_loop()
        waiting = self._waiting.setdefault(loop, [])
        future: asyncio.Future[Choice | None] = loop.create_future()
        waiting.append((tokens, future))
        if len(waiting) == 1:
            # Behind all that are ready now: those of them that generate come along.
            loop.call_soon(self._start, loop)
        return await future

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        task = loop.create_task(self._decide(self._waiting.pop(loop)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _decide(self, waiting: _Waiting) -> None:
        choices: list[Choice] | None = None
        try:
            choices = await self._router.choose([tokens for tokens, _ in waiting])
        finally:
            for number, (_, future) in enumerate(waiting):
                if not future.done():
                    future.set_result(None if choices is None else choices[number])
                elif choices is not None:
                    self._router.complete(choices[number])  # given up while it was decided
