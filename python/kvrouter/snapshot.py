"""Snapshots of what a service knows of its workers' caches: read at its start, written now and then and at its end."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from kvrouter import _core
from kvrouter.bench.local_http import HttpError
from kvrouter.service_client import ServiceClient

logger = logging.getLogger("kvrouter")
#: Of a snapshot, as ``Snapshot::kMaxBytes`` of src/replica/snapshot.h.
MAX_BYTES = 1 << 30
#: For a peer to walk its index, and for the bytes to come.
_DOWNLOAD_TIMEOUT_S = 60.0


def warm_start(router: _core.Router, path: Path | None, peer: ServiceClient | None) -> None:
    """Gives a router that has no workers yet what a peer knows, or, failing that, what a file says.

    Without either, or where they hold no snapshot, it starts with nothing; the log says why.
    """
    sources: list[tuple[str, Callable[[], bytes | None]]] = []
    if peer:
        sources.append((peer.url + "/snapshot", partial(peer.download, "/snapshot", _DOWNLOAD_TIMEOUT_S, MAX_BYTES)))
    if path:
        sources.append((str(path), partial(_read, path)))
    for source, read in sources:
        try:
            snapshot = read()
            if snapshot is None:
                logger.info("There is no snapshot at %s yet", source)
                continue
            workers = router.warm_start(snapshot)
        except (HttpError, OSError, ValueError) as error:
            logger.warning("The snapshot at %s is not used: %s", source, error)
            continue
        logger.info("Snapshot of %d workers read from %s: each counts once its worker confirms it", workers, source)
        return


def _read(path: Path) -> bytes | None:
    if not path.exists():
        return None
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES} bytes")
    return path.read_bytes()


class SnapshotWriter:
    """Writes a router's snapshot to a file every so often, and once more when asked.

    path: the file; what it held stays until the next snapshot is whole and on the disk.
    interval_s: seconds between two; 0: only when asked.
    """

    def __init__(self, router: _core.Router, path: Path, interval_s: float) -> None:
        self._router = router
        self._path = path
        self._interval_s = interval_s
        self._due = time.monotonic() + interval_s

    def follow(self) -> None:
        """Writes it if it is time."""
        if self._interval_s > 0 and time.monotonic() >= self._due:
            self.write()

    def write(self) -> None:
        """Writes it now; what keeps it from that is logged."""
        try:
            size = self._router.save_snapshot(str(self._path))
            logger.debug("Snapshot of %d bytes written to %s", size, self._path)
        except (OSError, ValueError, RuntimeError) as error:
            logger.warning("The snapshot could not be written: %s", error)
        self._due = time.monotonic() + self._interval_s
