"""Whether processes are there."""

from __future__ import annotations

from pathlib import Path


def runs(pid: int) -> bool:
    """Whether a process lives; one that has ended and waits for its parent to take note of it does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False
