"""A worker's process, seen from the launcher."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from pathlib import Path

_GUARD = Path(__file__).with_name("guard.py")
_TAIL_BYTES = 16384


class WorkerProcess:
    """One worker under a guard, which ends it with all its children when told to, or when this process is gone.

    Its output is appended to ``log_path``.  Methods may be called from any thread.

    Raises
    ------
    RuntimeError
        When the guard does not start.
    """

    def __init__(self, command: list[str], env: dict[str, str], log_path: Path, grace_s: float = 10.0) -> None:
        self.log_path = log_path
        self._exit_code: int | None = None
        self._ended = threading.Event()
        with log_path.open("ab") as log:
            self._guard = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_GUARD), str(os.getpid()), str(grace_s), *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=env,
                bufsize=0,
                # A Ctrl-C on the terminal is for the launcher, which then stops its workers in order.
                start_new_session=True,
            )
        assert self._guard.stdout is not None
        first = self._guard.stdout.readline().split()
        if len(first) != 2 or first[0] != b"pid":
            self._guard.wait()
            raise RuntimeError(f"the worker did not start: {self.tail(5) or 'its guard ended without a word'}")
        self.pid = int(first[1])
        threading.Thread(target=self._watch, name=f"kvrouter-worker-{self.pid}", daemon=True).start()

    def _watch(self) -> None:
        assert self._guard.stdout is not None
        last = self._guard.stdout.readline().split()
        if len(last) == 2 and last[0] == b"exit":
            self._exit_code = int(last[1])
        self._guard.wait()
        for pipe in (self._guard.stdin, self._guard.stdout):
            if pipe is not None:
                pipe.close()
        self._ended.set()

    def is_alive(self) -> bool:
        """Whether the worker's own process runs."""
        if self._ended.is_set():
            return False
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2]
        except OSError:
            return False
        return state.split()[0] not in ("Z", "X")

    @property
    def exit_code(self) -> int | None:
        """The worker's exit code, negative for a signal; None while it runs or when it is not known."""
        return self._exit_code

    def terminate(self) -> None:
        """Asks the worker to end, and kills it after the grace period; returns at once."""
        self._tell(b"T")

    def kill(self) -> None:
        """Kills the worker and its children with SIGKILL; returns at once."""
        self._tell(b"K")

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits until the worker and everything below it is gone; False when the time is over first."""
        return self._ended.wait(timeout_s)

    def tail(self, lines: int) -> str:
        """The log's last lines."""
        try:
            with self.log_path.open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - _TAIL_BYTES))
                text = log.read().decode(errors="replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-lines:])

    def _tell(self, command: bytes) -> None:
        assert self._guard.stdin is not None
        # Fails when the guard is gone, and its worker before it.
        with contextlib.suppress(OSError, ValueError):
            self._guard.stdin.write(command)
