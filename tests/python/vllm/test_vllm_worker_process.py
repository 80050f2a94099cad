"""Workers under a guard: nothing that a worker started outlives the one who launched it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from kvrouter.vllm.worker_process import WorkerProcess
from process_state import runs

# A worker with a child, and a grandchild that leaves session and group and is deaf to SIGTERM.
STUBBORN = textwrap.dedent(
    """
    import os, signal, subprocess, sys, time
    deaf = "import os, signal, time; os.setsid(); signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    deaf += "print('pid', os.getpid(), flush=True); time.sleep(600)"
    child = "import os, subprocess, sys, time; print('pid', os.getpid(), flush=True);"
    child += "subprocess.Popen([sys.executable, '-c', sys.argv[1]]); time.sleep(600)"
    if "deaf" in sys.argv:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("pid", os.getpid(), flush=True)
    subprocess.Popen([sys.executable, "-c", child, deaf])
    time.sleep(0.0 if "leave" in sys.argv else 600)
    """
)


def stubborn_command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", STUBBORN, *arguments]


def processes_in(log: Path, count: int, timeout_s: float = 20.0) -> list[int]:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        lines = log.read_text().splitlines() if log.exists() else []
        pids = [int(line.split()[1]) for line in lines if line.startswith("pid ")]
        if len(pids) >= count:
            return pids
        time.sleep(0.02)
    raise AssertionError(f"{count} processes did not start: {log.read_text()}")


def wait_gone(pids: list[int], timeout_s: float = 15.0) -> list[int]:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and any(map(runs, pids)):
        time.sleep(0.02)
    return [pid for pid in pids if runs(pid)]


@pytest.fixture
def log(tmp_path):
    return tmp_path / "worker.log"


def test_worker_process_terminate_ends_every_descendant(log):
    worker = WorkerProcess(stubborn_command(), dict(os.environ), log, grace_s=5.0)
    pids = processes_in(log, 3)
    assert worker.pid == pids[0]
    assert worker.is_alive()
    assert worker.exit_code is None
    worker.terminate()
    assert worker.wait(15.0)
    assert [pid for pid in pids if runs(pid)] == []
    assert not worker.is_alive()
    assert worker.exit_code == -signal.SIGTERM


def test_worker_process_deaf_to_sigterm_is_killed_after_the_grace_period(log):
    worker = WorkerProcess(stubborn_command("deaf"), dict(os.environ), log, grace_s=1.0)
    pids = processes_in(log, 3)
    started = time.monotonic()
    worker.terminate()
    assert worker.wait(15.0)
    assert 0.9 < time.monotonic() - started < 6.0
    assert [pid for pid in pids if runs(pid)] == []
    assert worker.exit_code == -signal.SIGKILL


def test_worker_process_kill_is_quick_and_takes_all(log):
    worker = WorkerProcess(stubborn_command("deaf"), dict(os.environ), log, grace_s=30.0)
    pids = processes_in(log, 3)
    started = time.monotonic()
    worker.kill()
    assert worker.wait(15.0)
    assert time.monotonic() - started < 5.0
    assert [pid for pid in pids if runs(pid)] == []
    # Signals to a worker that is gone are no error.
    worker.kill()
    worker.terminate()


def test_worker_process_that_ends_by_itself_leaves_nothing_behind(log):
    worker = WorkerProcess(stubborn_command("leave"), dict(os.environ), log, grace_s=2.0)
    assert worker.wait(15.0)
    assert worker.exit_code == 0
    pids = processes_in(log, 1)
    assert [pid for pid in pids if runs(pid)] == []


def test_worker_process_command_that_is_not_there_is_an_error(log):
    with pytest.raises(RuntimeError, match=r"did not start.*no-such-program"):
        WorkerProcess(["/no-such-program"], dict(os.environ), log)


def test_worker_process_killed_from_outside_reports_the_signal(log):
    worker = WorkerProcess(stubborn_command(), dict(os.environ), log, grace_s=2.0)
    pids = processes_in(log, 3)
    os.kill(worker.pid, signal.SIGKILL)
    assert worker.wait(15.0)
    assert worker.exit_code == -signal.SIGKILL
    assert [pid for pid in pids if runs(pid)] == []


LAUNCHER = textwrap.dedent(
    """
    import os, sys, time
    from pathlib import Path
    from kvrouter.vllm.worker_process import WorkerProcess
    workers = [
        WorkerProcess(sys.argv[2:], dict(os.environ), Path(sys.argv[1]) / f"worker-{i}.log", 1.0) for i in range(2)
    ]
    if os.fork() == 0:
        time.sleep(8)  # It has the pipes of its parent open, and must not keep the workers alive.
        os._exit(0)
    print("started", flush=True)
    time.sleep(600)
    """
)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_worker_process_launcher_ended_by_a_signal_leaves_no_process(tmp_path, number):
    command = [sys.executable, "-c", LAUNCHER, str(tmp_path), *stubborn_command("deaf")]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert launcher.stdout is not None
    assert launcher.stdout.readline() == b"started\n"
    pids = [pid for index in range(2) for pid in processes_in(tmp_path / f"worker-{index}.log", 3)]
    guards = [int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in (pids[0], pids[3])]
    launcher.send_signal(number)
    launcher.wait(20)
    launcher.stdout.close()
    assert wait_gone(pids + guards, 6.0) == []


def test_worker_process_guard_killed_takes_the_worker_with_it(log):
    worker = WorkerProcess(stubborn_command(), dict(os.environ), log, grace_s=2.0)
    pids = processes_in(log, 3)
    os.kill(worker._guard.pid, signal.SIGKILL)
    assert worker.wait(10.0)
    assert wait_gone(pids[:1]) == []
    for pid in pids[1:]:
        os.kill(pid, signal.SIGKILL)


def test_guard_that_does_not_see_a_process_for_a_moment_still_ends_it():
    """A process whose parent dies while /proc is read is below nobody in what was read."""
    script = """
import subprocess, sys, time
from types import SimpleNamespace
from kvrouter.vllm import guard

child = subprocess.Popen(["sleep", "600"])
seen, find = [], guard.descendants
guard.descendants = lambda: find() if seen else seen.append(None) or []
guard.Guard.end_the_rest(SimpleNamespace(deadline=time.monotonic(), grace_s=0.0))
sys.exit(0 if find() == [] else 1)
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == 0
