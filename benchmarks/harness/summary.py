"""Figures of several runs, as median and spread."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, TypeAlias

#: {"median", "min", "max"} of a figure.
Spread: TypeAlias = dict[str, float]


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summarise(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One record from the records of several runs: numbers become their spread, what else is equal in all is kept."""
    summary: dict[str, Any] = {}
    for key, first in runs[0].items():
        values = [run[key] for run in runs]
        if isinstance(first, (int, float)) and not isinstance(first, bool):
            summary[key] = spread(values)
        elif isinstance(first, dict):
            summary[key] = summarise(values)
        elif all(value == first for value in values):
            summary[key] = first
    return summary


def median(record: dict[str, Any], key: str) -> float:
    """The median of one figure."""
    value: float = record[key]["median"]
    return value
