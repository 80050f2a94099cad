"""Processes that do not outlive this one, stopped and killed by their id."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

_DIE_WITH_PARENT = ["setpriv", "--pdeathsig", "KILL"]  # of util-linux


class Process:
    """A command that can be killed and started again, always with the same arguments but for those given anew."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        self._command = list(command)
        self._log = log
        self._environment = dict(environment)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Of the process that runs, or of the last one that did."""
        assert self._process is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process is not None and self._process.poll() is None

    def start(self, extra: Sequence[str] = ()) -> None:
        """Starts it."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*_DIE_WITH_PARENT, *self._command, *extra],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self._environment},
            )

    async def kill(self) -> None:
        """SIGKILL, and waits until it is gone."""
        if self._process is not None:
            self.send(signal.SIGKILL)
            await asyncio.to_thread(self._process.wait)

    def send(self, number: signal.Signals) -> None:
        """Sends a signal, if it lives."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)
