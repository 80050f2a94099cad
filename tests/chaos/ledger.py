"""What became of every request."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum


class Fate(Enum):
    """Of a request, as its client sees it."""

    ANSWERED = "answered"
    """Whole, once, and right."""
    REFUSED = "refused"
    """With an error that says so: a status, or an error event in a stream."""
    LOST = "lost"
    """Neither: silence, a connection that ends without a word, an answer that is not whole or not its own."""
    DUPLICATED = "duplicated"
    """More than one answer, or parts of two."""


@dataclass
class Ledger:
    """Counts fates; keeps the reasons."""

    fates: dict[int, Fate] = field(default_factory=dict)
    reasons: Counter[str] = field(default_factory=Counter)
    resent: int = 0
    """By the client, because the router that had them was killed."""
    prompt_tokens: int = 0
    cached_tokens: int = 0

    def enter(self, number: int, fate: Fate, reason: str = "") -> None:
        """The fate of request ``number``.  A second entry is a duplicate."""
        if number in self.fates:
            fate, reason = Fate.DUPLICATED, "two fates"
        self.fates[number] = fate
        if fate is not Fate.ANSWERED:
            self.reasons[f"{fate.value}: {reason}"] += 1

    def count(self, fate: Fate) -> int:
        """How many have met it."""
        return sum(met is fate for met in self.fates.values())
