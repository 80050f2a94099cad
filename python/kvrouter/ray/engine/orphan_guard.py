"""Ends the processes of an engine whose worker was killed.

An engine's processes do not notice that the process that started them is gone by SIGKILL; they would keep their ports
and their GPU.  The guard is a small process of its own that waits for the end of a pipe, which is when its maker has
ended, by whatever signal, and then kills the processes that it was told of.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

import psutil


class OrphanGuard:
    """Watches over the processes that this one has started so far."""

    def __init__(self) -> None:
        children = psutil.Process().children(recursive=True)
        named = [f"{child.pid}:{child.create_time()}" for child in children]
        self._process = subprocess.Popen(
            [sys.executable, __file__, *named],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def release(self) -> None:
        """The processes have been ended in order: the guard goes, too."""
        self._process.kill()
        self._process.wait()


def main(named: list[str]) -> int:
    """Waits for the end of standard input, then kills what is named as ``pid:start time``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while os.read(0, 64):
        pass
    for name in named:
        pid, _, started = name.partition(":")
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(int(pid))
            # The number may be another process's by now.
            if process.create_time() == float(started):
                process.kill()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
