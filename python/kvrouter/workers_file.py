"""A file that says which workers there are, followed while the service runs."""

from __future__ import annotations

import logging
from pathlib import Path

from kvrouter.bench.local_http import HttpError
from kvrouter.service_client import ServiceClient
from kvrouter.worker_spec import read_workers_file

logger = logging.getLogger("kvrouter")


class WorkersFile:
    """Brings the service's workers in line with the file whenever that changes.

    Only workers that the file named once are ever removed: those added in other ways are not its business.  A file
    that cannot be read, or holds nonsense, changes nothing and is said once.

    path: JSON, as ``read_workers_file`` takes it.
    service: the service to tell, with the token for its admin calls if it has one.
    """

    def __init__(self, path: Path, service: ServiceClient) -> None:
        self._path = path
        self._service = service
        self._known = {worker.url for worker in read_workers_file(path)}
        self._seen = self._stamp()

    def follow(self) -> None:
        """Looks at the file, and acts if it has changed."""
        stamp = self._stamp()
        if stamp == self._seen:
            return
        self._seen = stamp
        try:
            wanted = {worker.url: worker for worker in read_workers_file(self._path)}
            for url, added in self._service.change_workers(wanted, self._known):
                if added:
                    logger.info("Worker %s added from %s", url, self._path)
                else:
                    logger.info("Worker %s removed: it is no longer in %s", url, self._path)
            self._known = set(wanted)
        except (OSError, ValueError, HttpError) as error:
            logger.warning("The workers file changes nothing: %s", error)

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino
