"""What a run says at its end: for people on standard error, for programs as the last line of standard output, JSON."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from chaos.checker import Consistency
from chaos.ledger import Fate, Ledger

CONSISTENT_WITHIN_S = 2.0


@dataclass
class Report:
    """Of one run."""

    seed: int
    inflicted: Counter[str]
    sent: int
    ledger: Ledger
    consistency: Consistency
    seconds_to_consistent: float

    @property
    def passed(self) -> bool:
        """Every request answered once or refused, and every index right in time."""
        summary = self.summary()
        return (
            summary["lost"] == summary["duplicated"] == summary["index_mismatched_blocks"] == 0
            and summary["requests"] == summary["answered"] + summary["refused"]
            and self.seconds_to_consistent <= CONSISTENT_WITHIN_S
        )

    def summary(self) -> dict[str, int | float]:
        """The last line's object."""
        return {
            "faults": self.inflicted.total(),
            "requests": self.sent,
            "answered": self.ledger.count(Fate.ANSWERED),
            "refused": self.ledger.count(Fate.REFUSED),
            "lost": self.ledger.count(Fate.LOST),
            "duplicated": self.ledger.count(Fate.DUPLICATED),
            "index_mismatched_blocks": self.consistency.mismatched,
            "seconds_to_consistent": round(self.seconds_to_consistent, 3),
        }

    def explain(self) -> None:
        """Says on standard error what the figures come from."""
        _say(f"seed {self.seed}; faults: " + ", ".join(f"{kind} {n}" for kind, n in sorted(self.inflicted.items())))
        _say(f"sent again because the gateway was killed: {self.ledger.resent}")
        for reason, count in self.ledger.reasons.most_common():
            _say(f"  {count} {reason}")
        found = self.consistency
        _say(f"blocks compared at the end: {found.held}; believed in wrongly {found.wrong}, not known {found.missing}")
        for line in self.consistency.where:
            _say(f"  {line}")


def together(reports: Sequence[Report]) -> dict[str, int | float]:
    """Sums of several runs, and the longest time."""
    summaries = [report.summary() for report in reports]
    total = {key: sum(summary[key] for summary in summaries) for key in summaries[0]}
    total["seconds_to_consistent"] = max(summary["seconds_to_consistent"] for summary in summaries)
    return total


def _say(text: str) -> None:
    print(text, file=sys.stderr)
