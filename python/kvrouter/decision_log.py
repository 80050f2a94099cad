"""The DEBUG lines of a decision, one a worker, as users of the NeMo-RL integration know them.

They go to the logger ``kvrouter``; where only the name of the original integration is set to DEBUG
(``nemo_rl.models.generation.dynamo``), to that one.
"""

from __future__ import annotations

import logging

from kvrouter._core import Decision

logger = logging.getLogger("kvrouter")
compatible_logger = logging.getLogger("nemo_rl.models.generation.dynamo")


def debug_enabled() -> bool:
    """Whether anyone wants the lines; cheap enough to ask on each decision."""
    return logger.isEnabledFor(logging.DEBUG) or compatible_logger.isEnabledFor(logging.DEBUG)


def decision_lines(decision: Decision, block_size: int) -> list[str]:
    """``worker_id: 0, logit = 2 * 0.200 - 0.300 - 0.100 = 0.000``; the chosen one's ends in ``<-- Selected``."""
    overlaps, usages, waitings, scores = (
        column.tolist() for column in (decision.overlaps, decision.kv_usages, decision.waitings, decision.scores)
    )
    scale = max(*waitings, 1)
    lines = []
    for worker, waiting in enumerate(waitings):
        blocks, usage, score = overlaps[worker], usages[worker], scores[worker]
        overlap = blocks * block_size / decision.num_tokens
        line = f"worker_id: {worker}, logit = 2 * {overlap:.3f} - {usage:.3f} - {waiting / scale:.3f} = {score:.3f}"
        lines.append(line + "  <-- Selected" if worker == decision.worker else line)
    return lines


def log_decision(decision: Decision, block_size: int) -> None:
    """Writes the lines.  No handler sees a line twice, whichever of the two loggers are enabled."""
    own = logger.isEnabledFor(logging.DEBUG)
    for line in decision_lines(decision, block_size):
        if own:
            logger.debug(line)
            _to_own_handlers(compatible_logger, line)
        else:
            compatible_logger.debug(line)


def _to_own_handlers(target: logging.Logger, line: str) -> None:
    """To the handlers set below the root for this name: the root's have had the line from ``kvrouter``."""
    current: logging.Logger | None = target
    while current is not None and current is not current.root:
        for handler in current.handlers:
            handler.handle(target.makeRecord(target.name, logging.DEBUG, __file__, 0, line, (), None))
        current = current.parent if current.propagate else None
