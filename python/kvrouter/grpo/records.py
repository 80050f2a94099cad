"""What a training leaves to look at: a line a step, metrics.jsonl, TensorBoard, plots."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console

from kvrouter.grpo.schema import MasterConfig


class TrainingLog:
    """Writes into ``logger.log_dir``; a resumed training goes on in the same ``metrics.jsonl``.

    first_step: lines of later steps, which a training left behind that was interrupted after its checkpoint, go.
    Raises ValueError when ``logger.tensorboard_enabled`` and TensorBoard is not installed.
    """

    def __init__(self, config: MasterConfig, first_step: int = 0, console: Console | None = None) -> None:
        self.folder = Path(config.logger.log_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._config = config
        self._console = console or Console()
        self._board = _tensorboard(self.folder) if config.logger.tensorboard_enabled else None
        OmegaConf.save(OmegaConf.create(asdict(config)), self.folder / "config.yaml")
        self.rows = [row for row in read_metrics(self.folder) if row["step"] <= first_step] if first_step else []
        self._file = (self.folder / "metrics.jsonl").open("w", encoding="utf-8")
        for row in self.rows:
            self._write(row)

    def _write(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def step(self, row: dict[str, Any]) -> None:
        """One step's figures; ``step`` is its number, from 1 (0: before training, validation only)."""
        self.rows.append(row)
        self._write(row)
        self._console.print(_line(row), highlight=False, soft_wrap=True)
        if self._board is not None:
            for name, value in row.items():
                if isinstance(value, int | float) and name != "step":
                    self._board.add_scalar(name, value, row["step"])
            self._board.flush()

    def close(self) -> None:
        """Writes the plots, where there is something to plot, and closes the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._config.logger.plots_enabled and any("reward_mean" in row for row in self.rows):
            _plot(self.rows, self.folder)


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The rows of a folder's ``metrics.jsonl``; none if there is no such file.  A last line cut short is left out."""
    path = Path(folder) / "metrics.jsonl"
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows


def _line(row: Mapping[str, Any]) -> str:
    parts = [f"[bold]step {row['step']}[/]"]
    if "reward_mean" in row:
        phases = ("generation_s", "logprobs_s", "train_s", "refit_s")
        parts += [
            f"reward {row['reward_mean']:.3f}",
            f"loss {row['loss']:+.4f}",
            f"KL {row['kl']:.4f}",
            f"{row['tokens_per_s']:.0f} tokens/s",
            f"hits {row['hit_rate']:.0%}",
        ]
        if row.get("router_us_p99") is not None:
            parts.append(f"router p99 {row['router_us_p99']:.0f} µs")
        parts.append(" + ".join(f"{name[:-2]} {row[name]:.1f}" for name in phases) + " s")
    if "validation_accuracy" in row:
        parts.append(f"[green]validation {row['validation_accuracy']:.1%}[/]")
    return "  ".join(parts)


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("logger.tensorboard_enabled: pip install tensorboard, or set it to false") from None
    return SummaryWriter(str(folder / "tensorboard"))


def _plot(rows: list[dict[str, Any]], folder: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    steps = [row for row in rows if "reward_mean" in row]
    numbers = [row["step"] for row in steps]
    checked = [row for row in rows if "validation_accuracy" in row]
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    axes[0].plot(numbers, [row["reward_mean"] for row in steps], label="reward, training")
    axes[0].plot(
        [row["step"] for row in checked], [row["validation_accuracy"] for row in checked], "o-", label="validation"
    )
    axes[0].legend()
    axes[1].plot(numbers, [row["hit_rate"] for row in steps])
    axes[1].set(title="share of prompt tokens cached", ylim=(0, 1))
    phases = ("generation_s", "logprobs_s", "train_s", "refit_s")
    axes[2].stackplot(numbers, [[row[name] for row in steps] for name in phases], labels=[name[:-2] for name in phases])
    axes[2].set(title="seconds a step, by phase")
    axes[2].legend()
    for axis in axes:
        axis.set_xlabel("step")
    figure.savefig(folder / "training.png", dpi=120)
    plt.close(figure)
