"""A file that says which workers there are, followed while the service runs."""

from __future__ import annotations

import json
import logging
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from kvrouter.serve import WorkerSpec, read_workers_file

logger = logging.getLogger("kvrouter")


class WorkersFile:
    """Brings the service's workers in line with the file whenever that changes.

    Only workers that the file named once are ever removed: those added in other ways are not its business.  A file
    that cannot be read, or holds nonsense, changes nothing and is said once.

    path: JSON, as ``read_workers_file`` takes it.
    url: the service's.
    token: bearer token for its admin calls, if it has one.
    """

    def __init__(self, path: Path, url: str, token: str = "") -> None:
        self._path = path
        self._url = url
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
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
            present = {entry["url"]: entry["worker_id"] for entry in self._ask("GET", "/workers")["workers"]}
            for url in sorted(wanted.keys() - present.keys()):
                self._add(wanted[url])
            for url in sorted((self._known & present.keys()) - wanted.keys()):
                self._ask("DELETE", f"/workers/{present[url]}")
                logger.info("Worker %s removed: it is no longer in %s", url, self._path)
            self._known = set(wanted)
        except (OSError, ValueError) as error:
            logger.warning("The workers file changes nothing: %s", error)

    def _add(self, worker: WorkerSpec) -> None:
        body = {"url": worker.url, "kv_events": worker.kv_events, "replay": worker.replay, "load": worker.load}
        self._ask("POST", "/workers", body)
        logger.info("Worker %s added from %s", worker.url, self._path)

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data=data, method=method, headers=self._headers)
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise ValueError(f"{method} {path}: {error.code} {error.read(1000).decode('utf-8', 'replace')}") from None
