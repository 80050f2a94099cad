"""The one asyncio loop of a process that outlives its callers' loops.

RL code calls from plain threads, from running loops, and from loops that live as long as one rollout; what must go on
(watching workers, bringing them back) and what is called synchronously runs here.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None


def loop() -> asyncio.AbstractEventLoop:
    """The loop, in a daemon thread that starts with the first call."""
    global _loop  # noqa: PLW0603
    with _lock:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, name="kvrouter-ray", daemon=True).start()
        return _loop


def spawn(coroutine: Coroutine[Any, Any, T]) -> Future[T]:
    """Runs it in the background."""
    return asyncio.run_coroutine_threadsafe(coroutine, loop())


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Runs it to its end and returns its result; from any thread but the background one, loop or no loop."""
    return spawn(coroutine).result()
