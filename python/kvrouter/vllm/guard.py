"""Runs one worker and makes sure that it does not outlive the launcher.

The launcher starts this file with the interpreter (standard library only, no package import) as
``python -I -S guard.py PARENT_PID GRACE_S COMMAND...``.  The guard starts COMMAND in a session of its own and ends it,
with every process that descends from it, when

- standard input says so: ``T`` is SIGTERM, then SIGKILL after GRACE_S seconds; ``K`` is SIGKILL at once;
- standard input ends, or the guard's parent is no longer PARENT_PID: the launcher is gone, by whatever signal;
- COMMAND itself ends: what it left behind goes with it.

On standard output it prints ``pid N`` at the start and ``exit N`` at the end (negative: the signal).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
POLL_S = 0.2


def set_process_option(option: int, value: int) -> None:
    """Calls Linux's ``prctl``; elsewhere the guard does without."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def descendants() -> list[int]:
    """Ids of the processes below this one, orphans included: they are this process's since it reaps them."""
    children: dict[int, list[int]] = {}
    try:
        names = os.listdir("/proc")
    except OSError:
        return []
    for name in names:
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", encoding="ascii", errors="replace") as file:
                    fields = file.read().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] != "Z":
                children.setdefault(int(fields[1]), []).append(int(name))
    found: list[int] = []
    unvisited = [os.getpid()]
    while unvisited:
        below = children.get(unvisited.pop(), [])
        found += below
        unvisited += below
    return found


def signal_all(number: int) -> None:
    """Sends a signal to every descendant."""
    for pid in descendants():
        with contextlib.suppress(OSError):
            os.kill(pid, number)


def reap() -> tuple[dict[int, int], bool]:
    """Collects ended children: process id to exit code, negative for a signal; and whether any child is left.

    A descendant that lives is a child, or below one: orphans become children of this process.
    """
    ended: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended, False
        if pid == 0:
            return ended, True
        ended[pid] = os.waitstatus_to_exitcode(status)


def report(text: str) -> None:
    """Tells the launcher, if it is still there."""
    with contextlib.suppress(OSError):
        os.write(1, f"{text}\n".encode())


class Guard:
    """The worker's process and what is to become of it."""

    def __init__(self, parent: int, grace_s: float, command: list[str]) -> None:
        self.parent = parent
        self.grace_s = grace_s
        self.asked = False
        self.exit_code: int | None = None
        self.deadline: float | None = None
        # The log is standard error; the worker must not see the control pipe.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            stderr=sys.stderr,
            start_new_session=True,
            # Safe here: the guard has one thread, which lives as long as the process.
            preexec_fn=lambda: set_process_option(PR_SET_PDEATHSIG, signal.SIGTERM),  # noqa: PLW1509
        )
        self.pid = process.pid
        report(f"pid {self.pid}")

    def terminate(self) -> None:
        """SIGTERM to the worker, which ends its own children; the deadline looks after those that stay."""
        if self.deadline is None:
            self.deadline = time.monotonic() + self.grace_s
            if self.exit_code is None:
                os.kill(self.pid, signal.SIGTERM)

    def read_control(self) -> bool:
        """Obeys standard input; False at its end."""
        commands = os.read(0, 64)
        if b"K" in commands:
            self.deadline = time.monotonic()
        elif b"T" in commands or not commands:
            self.terminate()
        return bool(commands)

    def run(self, wakeup: int) -> int:
        """Waits for the end; returns the worker's exit code."""
        watched = [0, wakeup]
        while self.exit_code is None:
            # Signals arrive on the wake-up pipe; the timeout is for the parent's id.
            ready = select.select(watched, [], [], POLL_S)[0]
            if wakeup in ready:
                os.read(wakeup, 64)
            if 0 in ready and not self.read_control():
                watched.remove(0)
            if self.asked or os.getppid() != self.parent:
                self.terminate()
            if self.deadline is not None and time.monotonic() >= self.deadline:
                signal_all(signal.SIGKILL)
            self.exit_code = reap()[0].get(self.pid)
        self.end_the_rest()
        return self.exit_code

    def end_the_rest(self) -> None:
        """Ends what the worker left behind: at once after SIGKILL, with a moment to tidy up otherwise."""
        killed = self.deadline is not None and time.monotonic() >= self.deadline
        limit = time.monotonic() + (0.0 if killed else min(2.0, self.grace_s))
        if not killed:
            signal_all(signal.SIGTERM)
        # Not "while descendants()": one whose parent dies while /proc is read is not seen for that moment.
        while reap()[1]:
            if time.monotonic() >= limit:
                signal_all(signal.SIGKILL)
            time.sleep(0.02)


def main() -> int:
    """Runs the guard; returns its exit status."""
    parent, grace_s, command = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
    set_process_option(PR_SET_CHILD_SUBREAPER, 1)
    wakeup_read, wakeup_write = os.pipe()
    os.set_blocking(wakeup_write, False)
    signal.set_wakeup_fd(wakeup_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        guard = Guard(parent, grace_s, command)
    except OSError as error:
        print(f"cannot start {command[0]}: {error}", file=sys.stderr)
        report("exit 127")
        return 1

    def ask(*_: object) -> None:
        guard.asked = True

    signal.signal(signal.SIGTERM, ask)
    signal.signal(signal.SIGHUP, ask)
    report(f"exit {guard.run(wakeup_read)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
