"""What a training leaves: metrics.jsonl, TensorBoard, plots."""

from __future__ import annotations

import io

import pytest

pytest.importorskip("torch", reason="torch is not installed: run scripts/install_vllm.py")
pytest.importorskip("omegaconf", reason="OmegaConf is not installed: pip install 'kvrouter[grpo]'")
from rich.console import Console

from kvrouter.grpo import config_from
from kvrouter.grpo.records import TrainingLog, read_metrics


def row(step, **changes):
    return {
        "step": step,
        "reward_mean": step / 10,
        "loss": 0.5,
        "kl": 0.01,
        "tokens_per_s": 1e4,
        "hit_rate": 0.75,
        "router_us_p99": 321.0,
        "generation_s": 1.0,
        "logprobs_s": 0.5,
        "train_s": 2.0,
        "refit_s": 0.1,
        "router/decisions": 16.0,
        **changes,
    }


def log_of(folder, first_step=0, **logger):
    console = Console(file=io.StringIO(), width=300)
    config = config_from({"logger": {"log_dir": str(folder), **logger}})
    return TrainingLog(config, first_step, console), console.file


def test_a_line_a_step_and_a_plot_beside_another_run(tmp_path):
    other, _ = log_of(tmp_path / "off")
    other.step(row(1, **{"router/decisions": 0.0, "router_us_p99": None}))
    other.close()
    log, printed = log_of(tmp_path / "on", compare_with=str(tmp_path / "off"))
    log.step({"step": 0, "validation_accuracy": 0.25})
    for step in (1, 2):
        log.step(row(step))
    log.close()
    assert read_metrics(tmp_path / "on") == log.rows
    lines = printed.getvalue().splitlines()
    assert lines[0].endswith("validation 25.0%")
    for part in ("step 2", "reward 0.200", "hits 75%", "router p99 321 µs", "train 2.0"):
        assert part in lines[2]
    assert (tmp_path / "on" / "training.png").read_bytes().startswith(b"\x89PNG")


def test_a_resumed_training_drops_what_came_after_its_checkpoint(tmp_path):
    log, _ = log_of(tmp_path, plots_enabled=False)
    for step in (1, 2, 3):
        log.step(row(step))
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')  # cut short
    resumed, _ = log_of(tmp_path, first_step=2, plots_enabled=False)
    resumed.step(row(3, loss=0.25))
    resumed.close()
    assert [(one["step"], one["loss"]) for one in read_metrics(tmp_path)] == [(1, 0.5), (2, 0.5), (3, 0.25)]


def test_tensorboard_has_every_number(tmp_path):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="TensorBoard is not installed: pip install 'kvrouter[grpo]'",
    )
    log, _ = log_of(tmp_path, tensorboard_enabled=True, plots_enabled=False)
    for step in (1, 2):
        log.step(row(step))
    log.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(row(1)) - {"step"}
    rewards = [(event.step, event.value) for event in events.Scalars("reward_mean")]
    assert rewards == [(1, pytest.approx(0.1)), (2, pytest.approx(0.2))]


def test_a_logger_that_is_not_installed_is_named(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"logger\.wandb_enabled: pip install wandb, or set it to false"):
        log_of(tmp_path, wandb_enabled=True)
