"""The plot that a training leaves: reward, hit rate and time by step, beside another run's if there is one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: Phases of a step, in order; ``<phase>_s`` are their seconds in a row of ``metrics.jsonl``.
PHASES = ("generation", "logprobs", "train", "refit")
_COLORS = ("#0072B2", "#56B4E9", "#E69F00", "#999999")
_OTHER = "#D55E00"

Rows = Sequence[dict[str, Any]]


def write_plot(path: Path, rows: Rows, other: Rows | None = None, labels: tuple[str, str] | None = None) -> None:
    """Draws a run's rows; ``other``'s beside it.

    labels: what the two runs are called; by default, whether each had a router.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    from kvrouter.bench.plot_style import PLOT_STYLE

    runs = [(rows, _COLORS[0])] + ([] if not other else [(other, _OTHER)])
    names = labels or (_name(rows), _name(other or ()))
    with mpl.rc_context(PLOT_STYLE):
        figure, axes = plt.subplots(1, 4, figsize=(18, 4), layout="constrained")
        for (run, color), name in zip(runs, names, strict=False):
            steps = _steps(run)
            checked = [row for row in run if "validation_accuracy" in row]
            numbers = [row["step"] for row in steps]
            axes[0].plot(
                numbers, [row["reward_mean"] for row in steps], color=color, alpha=0.6, label=f"reward, {name}"
            )
            if checked:
                axes[0].plot(
                    [row["step"] for row in checked],
                    [row["validation_accuracy"] for row in checked],
                    "o--",
                    color=color,
                    label=f"validation, {name}",
                )
            axes[1].plot(numbers, [row["hit_rate"] for row in steps], color=color, label=name)
            axes[2].plot(numbers, [row["generation_s"] for row in steps], color=color, label=name)
        steps = _steps(rows)
        axes[3].stackplot(
            [row["step"] for row in steps],
            [[row[f"{phase}_s"] for row in steps] for phase in PHASES],
            labels=PHASES,
            colors=_COLORS,
        )
        axes[0].set(title="reward", ylim=(0, 1.02))
        axes[1].set(title="share of prompt tokens cached", ylim=(0, 1))
        axes[2].set(title="seconds of generation a step")
        axes[2].set_ylim(bottom=0)
        axes[3].set(title=f"seconds a step, {names[0]}")
        for axis in axes:
            axis.set_xlabel("step")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.legend(fontsize=8)
        figure.savefig(path, dpi=120)
        plt.close(figure)


def _steps(rows: Rows) -> list[dict[str, Any]]:
    return [row for row in rows if "reward_mean" in row]


def _name(rows: Rows) -> str:
    routed = any(row.get("router/decisions") for row in rows)
    return "with router" if routed else "without router"
