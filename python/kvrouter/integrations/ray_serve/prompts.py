"""The token ids of a request's prompt, where it has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

TOKEN_IDS_KWARGS = ("request_token_ids", "prompt_token_ids", "token_ids")
"""Keyword arguments of a call that are token ids; the first is Ray Serve LLM's own."""
_PROMPT_FIELDS = ("prompt_token_ids", "prompt", "tokens")
"""Fields of a request object or mapping that may be token ids."""


def prompt_tokens(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sequence[int] | None:
    """The token ids among the arguments of a call; None when there are none.

    They are a keyword argument named in TOKEN_IDS_KWARGS, or a field ``prompt_token_ids``, ``prompt`` or ``tokens`` of
    an argument (an object such as vLLM's ``CompletionRequest``, or a mapping), if that is a list of integers.
    """
    for name in TOKEN_IDS_KWARGS:
        if _are_tokens(kwargs.get(name)):
            return cast("list[int]", kwargs[name])
    for argument in (*args, *kwargs.values()):
        for field in _PROMPT_FIELDS:
            value = argument.get(field) if isinstance(argument, Mapping) else getattr(argument, field, None)
            if _are_tokens(value):
                return cast("list[int]", value)
    return None


def _are_tokens(value: Any) -> bool:
    # A list of prompts begins with a string or a list; the ids themselves are checked where they are hashed.
    return isinstance(value, list) and len(value) > 0 and type(value[0]) is int
