"""Small synchronous HTTP for control and scraping: standard library only, proxies of the environment ignored."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from typing import Any

#: An answer longer than this is not one of ours.
MAX_ANSWER_BYTES = 16 << 20

_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class HttpError(RuntimeError):
    """A request that got no usable answer; the message names the URL and the reason."""


def read_answer(
    opener: urllib.request.OpenerDirector,
    request: urllib.request.Request,
    timeout_s: float,
    hints: Mapping[int, str] | None = None,
) -> str:
    """The body of the answer to a request.

    hints: what to say of a status instead of what the answer says.

    Raises:
        HttpError: nobody listens, the time is over, the status is not 2xx, or the answer is too long.
    """
    return read_bytes(opener, request, timeout_s, hints).decode(errors="replace")


def read_bytes(
    opener: urllib.request.OpenerDirector,
    request: urllib.request.Request,
    timeout_s: float,
    hints: Mapping[int, str] | None = None,
    max_bytes: int = MAX_ANSWER_BYTES,
) -> bytes:
    """Like `read_answer`, for an answer that is no text, or a longer one."""
    url = request.full_url
    try:
        with opener.open(request, timeout=timeout_s) as answer:
            body: bytes = answer.read(max_bytes + 1)
    except urllib.error.HTTPError as error:
        with error:
            reason = error.read(300).decode(errors="replace").strip()
        reason = (hints or {}).get(error.code, reason)
        raise HttpError(f"{url} answered {error.code}{': ' + reason if reason else ''}") from error
    except (OSError, HTTPException, ValueError) as error:
        reason = str(getattr(error, "reason", error)) or type(error).__name__
        raise HttpError(f"{url}: {reason}") from error
    if len(body) > max_bytes:
        raise HttpError(f"{url}: the answer is longer than {max_bytes} bytes")
    return body


def json_object(url: str, body: str) -> dict[str, Any]:
    """The JSON object that an answer is.

    Raises:
        HttpError: it is something else; the message names the URL.
    """
    try:
        value = json.loads(body)
    except ValueError as error:
        raise HttpError(f"{url} did not answer with JSON: {body[:100]!r}") from error
    if not isinstance(value, dict):
        raise HttpError(f"{url} did not answer with a JSON object: {body[:100]!r}")
    return value


def http_request(url: str, *, post: bool = False, timeout_s: float = 5.0) -> str:
    """The body of the answer to a GET, or to an empty POST.

    Raises:
        HttpError: nobody listens, the time is over, or the status is not 2xx.
    """
    try:
        request = urllib.request.Request(url, data=b"" if post else None, method="POST" if post else "GET")
    except ValueError as error:
        raise HttpError(f"{url}: {error}") from error
    return read_answer(_opener, request, timeout_s)


def http_json(url: str, *, post: bool = False, timeout_s: float = 5.0) -> dict[str, Any]:
    """Like `http_request`, for an answer that is a JSON object.

    Raises:
        HttpError: also for an answer that is something else.
    """
    return json_object(url, http_request(url, post=post, timeout_s=timeout_s))
