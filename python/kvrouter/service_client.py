"""The service's own API as a client sees it: bearer token, TLS, clear errors."""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any

from kvrouter.bench.local_http import MAX_ANSWER_BYTES, HttpError


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
        try:
            with self._opener.open(request, timeout=timeout_s or self._timeout_s) as answer:
                content: bytes = answer.read(MAX_ANSWER_BYTES + 1)
        except urllib.error.HTTPError as error:
            with error:
                reason = error.read(300).decode(errors="replace").strip()
            hint = ": give the token with --api-token-file" if error.code == 401 else f": {reason}" if reason else ""
            raise HttpError(f"{self.url}{path} answered {error.code}{hint}") from error
        except (OSError, HTTPException, ValueError) as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
            raise HttpError(f"{self.url}{path}: {reason}") from error
        if len(content) > MAX_ANSWER_BYTES:
            raise HttpError(f"{self.url}{path}: the answer is longer than {MAX_ANSWER_BYTES} bytes")
        return content.decode(errors="replace")

    def json(self, method: str, path: str, body: Any = None, timeout_s: float | None = None) -> dict[str, Any]:
        """Like ``text``, for an answer that is a JSON object; raises HttpError for another one."""
        content = self.text(method, path, body, timeout_s)
        try:
            value = json.loads(content)
        except ValueError as error:
            raise HttpError(f"{self.url}{path} did not answer with JSON: {content[:100]!r}") from error
        if not isinstance(value, dict):
            raise HttpError(f"{self.url}{path} did not answer with a JSON object: {content[:100]!r}")
        return value

    def workers(self) -> dict[str, Any]:
        """The answer of ``GET /workers``; raises HttpError when it does not answer, or not with that."""
        answer = self.json("GET", "/workers")
        workers = answer.get("workers")
        if not isinstance(workers, list) or not all(isinstance(worker, dict) for worker in workers):
            raise HttpError(f"{self.url}/workers answers without a list of workers: is this a kvrouter?")
        return answer


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
