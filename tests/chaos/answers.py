"""Reads answers of the OpenAI API strictly: what is not whole, or not one answer, does not pass."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from chaos.ledger import Fate


class UnreadableError(Exception):
    """The fate of an answer that is none."""

    def __init__(self, fate: Fate, reason: str) -> None:
        super().__init__(reason)
        self.fate = fate
        self.reason = reason


class CutOffError(Exception):
    """The connection ended before the answer did, without an error."""


@dataclass
class Answer:
    """A whole answer."""

    tokens: list[int] = field(default_factory=list)
    cached_tokens: int = 0


async def read_answer(response: aiohttp.ClientResponse, stream: bool) -> Answer:
    """The answer in a response.

    Raises UnreadableError for an error or an answer that is none, CutOffError when the connection ends early.
    """
    if response.status != 200:
        raise UnreadableError(*_refusal(response.status, await response.read()))
    if not stream:
        return _whole(await response.json(content_type=None))
    return await _streamed(response)


def _refusal(status: int, body: bytes) -> tuple[Fate, str]:
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, TypeError, KeyError):
        # That it is the server's fault, and so may be asked again, the status says by itself.
        return Fate.REFUSED if status >= 500 else Fate.LOST, f"HTTP {status} without an error message"
    return Fate.REFUSED, f"{status} {message}"


def _whole(body: dict[str, Any]) -> Answer:
    details = body["usage"].get("prompt_tokens_details") or {}
    return Answer(body["choices"][0]["token_ids"], details.get("cached_tokens") or 0)


async def _streamed(response: aiohttp.ClientResponse) -> Answer:
    answer = Answer()
    ids: set[str] = set()
    finished = done = 0
    async for raw in response.content:
        line = raw.strip()
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            done += 1
            continue
        event = json.loads(data)
        if "error" in event:
            raise UnreadableError(Fate.REFUSED, f"in its stream: {event['error']['message']}")
        ids.add(event["id"])
        for choice in event["choices"]:
            answer.tokens += choice.get("token_ids") or []
            finished += choice["finish_reason"] is not None
    if done == 0:
        raise CutOffError("the stream ended without [DONE]")
    if done > 1 or finished > 1 or len(ids) > 1:
        raise UnreadableError(Fate.DUPLICATED, f"{done} ends, {len(ids)} answers in one stream")
    return answer
