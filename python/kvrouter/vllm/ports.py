"""TCP ports for workers: checked, found, and held until the worker binds them."""

from __future__ import annotations

import errno
import random
import socket
from pathlib import Path

_LISTEN = "0A"  # State of a listening socket in /proc/net/tcp.
_LOWEST_AUTOMATIC_PORT = 15000
_ATTEMPTS = 500


class PortTakenError(RuntimeError):
    """A port that a setting asks for is used by another process."""


def check_port(base: int, setting: str, offset: int = 0) -> int:
    """``base + offset`` if both are ports; ``ValueError`` naming ``setting`` otherwise."""
    if isinstance(base, bool) or not isinstance(base, int):
        raise ValueError(f"{setting} must be a whole number, not {base!r}")
    if not 1 <= base <= 65535:
        raise ValueError(f"{setting} must be between 1 and 65535, not {base}")
    if base + offset > 65535:
        raise ValueError(f"{setting} = {base} is too high: number {offset} from it would have port {base + offset}")
    return base + offset


def port_is_free(port: int, host: str = "") -> bool:
    """Whether a server could listen on ``port`` of ``host`` (every interface by default) now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            raise
    return True


def port_holder(port: int) -> str | None:
    """The process that listens on ``port``, as ``"name (pid 123)"``; None when it cannot be told."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == _LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{fields[9]}]")
    if not inodes:
        return None
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(str(fd.readlink()) in inodes for fd in (process / "fd").iterdir()):
                return f"{(process / 'comm').read_text(encoding='utf-8').strip()} (pid {process.name})"
        except OSError:
            continue
    return None


class PortRange:
    """``count`` ports from ``base`` on, kept for this process until ``release``.

    Each is bound, but not listened on, with address re-use: a worker that listens with address re-use (ZeroMQ and
    HTTP servers do) gets it all the same, while another launcher that looks for free ports passes it by.
    """

    def __init__(self, base: int, sockets: list[socket.socket]) -> None:
        self.base = base
        self.count = len(sockets)
        self._sockets = sockets

    def __getitem__(self, index: int) -> int:
        return self.base + index

    def release(self) -> None:
        """Gives the ports up; calling it again does nothing."""
        for held in self._sockets:
            held.close()
        self._sockets = []


def reserve_ports(base: int, count: int, setting: str, host: str = "") -> PortRange:
    """Reserves the ports ``base`` to ``base + count - 1``.

    Raises
    ------
    ValueError
        When one is out of range; the message names ``setting``.
    PortTakenError
        When one is in use; the message names the port, ``setting`` and, where it can be told, the process.
    """
    check_port(base, setting, count - 1)
    held: list[socket.socket] = []
    for port in range(base, base + count):
        if not port_is_free(port, host):
            for other in held:
                other.close()
            holder = port_holder(port)
            by = f" by {holder}" if holder else ""
            raise PortTakenError(f"port {port} ({setting} + {port - base}) is taken{by}: set {setting} to another port")
        held.append(_hold(port, host))
    return PortRange(base, held)


def find_free_ports(count: int, host: str = "") -> PortRange:
    """Finds ``count`` ports in a row that are free, outside the range that outgoing connections use, and holds them.

    Raises ``RuntimeError`` when there are none.
    """
    highest = _first_ephemeral_port() - count
    lowest = min(_LOWEST_AUTOMATIC_PORT, highest)
    if lowest < 1024:
        lowest, highest = 1024, 65535 - count
    generator = random.SystemRandom()
    for _ in range(_ATTEMPTS):
        base = generator.randint(lowest, highest)
        held: list[socket.socket] = []
        for port in range(base, base + count):
            if not port_is_unused(port, host):
                break
            held.append(_hold(port, host))
        if len(held) == count:
            return PortRange(base, held)
        for other in held:
            other.close()
    raise RuntimeError(f"found no {count} free ports in a row between {lowest} and {highest + count}: give base ports")


def _hold(port: int, host: str) -> socket.socket:
    held = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        held.bind((host, port))
    except OSError:
        held.close()
        raise
    return held


def port_is_unused(port: int, host: str = "") -> bool:
    """Whether nobody holds ``port`` of ``host``, listening or not."""
    # Without address re-use the bind fails on a port that anybody holds, listening or not.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _first_ephemeral_port() -> int:
    try:
        text = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii")
        return int(text.split()[0])
    except (OSError, ValueError, IndexError):
        return 32768
