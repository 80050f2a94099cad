"""The service's own API as a client sees it: bearer token, TLS, clear errors."""

from __future__ import annotations

import json
import ssl
import urllib.request
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from kvrouter.bench.local_http import HttpError, json_object, read_answer, read_bytes
from kvrouter.worker_spec import WorkerSpec

_HINTS = {401: "give the token with --api-token-file"}


class ServiceClient:
    """Requests to one ``kvrouter serve``, or to a worker behind TLS.

    url: its base.
    token: the bearer token, if it asks for one.
    ca_file: PEM file with the authorities to trust for https; None: the system's.
    tls: used instead of a context made from ``ca_file``.
    """

    def __init__(
        self,
        url: str,
        token: str = "",
        ca_file: Path | None = None,
        *,
        timeout_s: float = 5.0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self._timeout_s = timeout_s
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
        handlers: list[Any] = [urllib.request.ProxyHandler({})]
        if self.url.startswith("https://"):
            context = tls or ssl.create_default_context(cafile=str(ca_file) if ca_file else None)
            handlers.append(urllib.request.HTTPSHandler(context=context))
        self._opener = urllib.request.build_opener(*handlers)

    def text(
        self,
        method: str,
        path: str,
        body: Any = None,
        timeout_s: float | None = None,
        headers: dict[str, str] | None = None,
    ) -> str:
        """The body of the answer.

        Raises HttpError when there is none, its status is not 2xx, or it is too long.
        """
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data=data, method=method, headers=self._headers | (headers or {})
        )
        return read_answer(self._opener, request, timeout_s or self._timeout_s, _HINTS)

    def download(self, path: str, timeout_s: float, max_bytes: int) -> bytes:
        """The body of a GET, at most ``max_bytes`` long; raises HttpError as ``text`` does."""
        request = urllib.request.Request(self.url + path, headers=self._headers)
        return read_bytes(self._opener, request, timeout_s, _HINTS, max_bytes)

    def json(self, method: str, path: str, body: Any = None, timeout_s: float | None = None) -> dict[str, Any]:
        """Like ``text``, for an answer that is a JSON object; raises HttpError for another one."""
        return json_object(self.url + path, self.text(method, path, body, timeout_s))

    def workers(self) -> dict[str, Any]:
        """The answer of ``GET /workers``; raises HttpError when it does not answer, or not with that."""
        answer = self.json("GET", "/workers")
        workers = answer.get("workers")
        if not isinstance(workers, list) or not all(isinstance(worker, dict) for worker in workers):
            raise HttpError(f"{self.url}/workers answers without a list of workers: is this a kvrouter?")
        return answer

    def change_workers(self, wanted: Mapping[str, WorkerSpec], removable: Set[str]) -> Iterator[tuple[str, bool]]:
        """Adds the workers that the service lacks, and removes those that are no longer wanted.

        wanted: by URL.
        removable: URLs of workers that may be removed.
        Yields URL and whether it was added (else removed), each when it is done.  Raises HttpError.
        """
        present: dict[str, list[int]] = {}
        for entry in self.workers()["workers"]:
            present.setdefault(entry["url"], []).append(entry["worker_id"])
        for url in sorted(wanted.keys() - present.keys()):
            self.json("POST", "/workers", wanted[url].to_dict())
            yield url, True
        for url in sorted((removable & present.keys()) - wanted.keys()):
            for worker in present[url]:
                self.json("DELETE", f"/workers/{worker}")
            yield url, False


def read_token(path: Path | None) -> str:
    """The token in a file, without the white space around it; "" for no file.

    Raises ValueError for an empty file, OSError when it cannot be read.
    """
    if path is None:
        return ""
    token = path.read_text(encoding="utf-8").strip()
    if not token:
        raise ValueError(f"{path} is empty: it must hold a token")
    return token
