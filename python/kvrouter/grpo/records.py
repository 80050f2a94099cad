"""What a training leaves to look at: a line a step, metrics.jsonl, TensorBoard, Weights & Biases, plots."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from omegaconf import OmegaConf
from rich.console import Console

from kvrouter.grpo.plots import PHASES, write_plot
from kvrouter.grpo.rollout import Rollout
from kvrouter.grpo.schema import MasterConfig


class Board(Protocol):
    """Where numbers are shown."""

    def write(self, figures: Mapping[str, float], step: int) -> None:
        """One step's numbers."""

    def close(self) -> None:
        """No more will come."""


class TrainingLog:
    """Writes into ``logger.log_dir``; a resumed training goes on in the same ``metrics.jsonl``.

    first_step: lines of later steps, which a training left behind that was interrupted after its checkpoint, go.
    Raises ValueError for a logger that is enabled and not installed.
    """

    def __init__(self, config: MasterConfig, first_step: int = 0, console: Console | None = None) -> None:
        self.folder = Path(config.logger.log_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._config = config
        self._console = console or Console()
        self._boards = _boards(config, self.folder, first_step)
        OmegaConf.save(OmegaConf.create(asdict(config)), self.folder / "config.yaml")
        self.rows = _kept(self.folder / "metrics.jsonl", first_step)
        self._metrics = _rewritten(self.folder / "metrics.jsonl", self.rows)
        self._rollouts = None
        if config.logger.rollouts_enabled:
            path = self.folder / "rollouts.jsonl"
            self._rollouts = _rewritten(path, _kept(path, first_step))

    def step(self, row: dict[str, Any]) -> None:
        """One step's figures; ``step`` is its number, from 1 (0: before training, validation only)."""
        self.rows.append(row)
        _write(self._metrics, row)
        self._console.print(_line(row), highlight=False, soft_wrap=True)
        figures = {name: value for name, value in row.items() if isinstance(value, int | float) and name != "step"}
        for board in self._boards:
            board.write(figures, row["step"])

    def rollout(self, step: int, rollout: Rollout, advantages: torch.Tensor) -> None:
        """A line a sample into ``rollouts.jsonl``, if that is wanted."""
        if self._rollouts is None:
            return
        versions = rollout.weight_version.tolist()
        for episode, advantage, version in zip(rollout.episodes, advantages.tolist(), versions, strict=True):
            line = {
                "step": step,
                "question": episode.problem.questions[-1][-40:],
                "responses": episode.responses,
                "reward": episode.reward,
                "advantage": advantage,
                "weight_version": version,
                "workers": episode.workers,
                "prompt_tokens": episode.prompt_tokens,
                "cached_tokens": episode.cached_tokens,
                "truncated": episode.truncated,
            }
            _write(self._rollouts, line)

    def close(self) -> None:
        """Writes the plot, where there is something to plot, and closes the files."""
        self._metrics.close()
        if self._rollouts is not None:
            self._rollouts.close()
        for board in self._boards:
            board.close()
        logger = self._config.logger
        if logger.plots_enabled and any("reward_mean" in row for row in self.rows):
            other = None if logger.compare_with is None else read_metrics(logger.compare_with)
            write_plot(self.folder / "training.png", self.rows, other)


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The rows of a folder's ``metrics.jsonl``; none if there is no such file.  A last line cut short is left out."""
    return _read(Path(folder) / "metrics.jsonl")


def _read(path: Path) -> list[dict[str, Any]]:
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows


def _kept(path: Path, first_step: int) -> list[dict[str, Any]]:
    """Of a training that is resumed, the lines up to its checkpoint."""
    return [row for row in _read(path) if row["step"] <= first_step] if first_step else []


def _rewritten(path: Path, rows: list[dict[str, Any]]) -> Any:
    file = path.open("w", encoding="utf-8")
    for row in rows:
        _write(file, row)
    return file


def _write(file: Any, row: Mapping[str, Any]) -> None:
    file.write(json.dumps(row) + "\n")
    file.flush()


def _line(row: Mapping[str, Any]) -> str:
    parts = [f"[bold]step {row['step']}[/]"]
    if "reward_mean" in row:
        parts += [
            f"reward {row['reward_mean']:.3f}",
            f"loss {row['loss']:+.4f}",
            f"KL {row['kl']:.4f}",
            f"{row['tokens_per_s']:.0f} tokens/s",
            f"hits {row['hit_rate']:.0%}",
        ]
        if row.get("router_us_p99") is not None:
            parts.append(f"router p99 {row['router_us_p99']:.0f} µs")
        parts.append(" + ".join(f"{name} {row[f'{name}_s']:.1f}" for name in PHASES) + " s")
    if "validation_accuracy" in row:
        parts.append(f"[green]validation {row['validation_accuracy']:.1%}[/]")
    return "  ".join(parts)


# --- boards ---


def _boards(config: MasterConfig, folder: Path, first_step: int) -> list[Board]:
    boards: list[Board] = []
    if config.logger.tensorboard_enabled:
        boards.append(_TensorBoard(folder / "tensorboard", first_step))
    if config.logger.wandb_enabled:
        boards.append(_WeightsAndBiases(config, folder))
    return boards


class _TensorBoard:
    def __init__(self, folder: Path, first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError("logger.tensorboard_enabled: pip install tensorboard, or set it to false") from None
        # What a training left behind that this one resumes, or replaces, is not shown beside it.
        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else 0)

    def write(self, figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, config: MasterConfig, folder: Path) -> None:
        try:
            import wandb
        except ImportError:
            raise ValueError("logger.wandb_enabled: pip install wandb, or set it to false") from None
        settings = config.logger.wandb
        self._run = wandb.init(project=settings.project, name=settings.name, dir=str(folder), config=asdict(config))

    def write(self, figures: Mapping[str, float], step: int) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()
