"""The command line of ``examples/run_grpo.py``."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated

import typer

from kvrouter.grpo.config import load_config


def run_grpo(
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, ++key=value, +key=value or ~key")] = None,
    config: Annotated[
        str, typer.Option(help="the training config, a YAML file")
    ] = "examples/configs/grpo_with_router_example.yaml",
) -> None:
    """Trains a policy by GRPO with rollouts from router-fed vLLM engines."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        settings = load_config(config, overrides or ())
        from kvrouter.grpo.async_trainer import async_grpo_train
        from kvrouter.grpo.sync_trainer import grpo_train
        from kvrouter.grpo.training import setup

        with _ray(settings.cluster.gpus_per_node, settings.cluster.use_gpus), setup(settings) as training:
            train = async_grpo_train if settings.grpo.async_grpo.enabled else grpo_train
            rows = train(training)
    except ValueError as error:
        sys.exit(f"run_grpo: {error}")
    checked = [row["validation_accuracy"] for row in rows if "validation_accuracy" in row]
    if checked:
        print(f"validation accuracy: {checked[0]:.1%} at first, {checked[-1]:.1%} at the end")
    print(f"figures: {settings.logger.log_dir}/metrics.jsonl")


def _ray(places: int, use_gpus: bool) -> AbstractContextManager[None]:
    """The running cluster that RAY_ADDRESS names, or a Ray of this training's own."""
    import ray

    if "RAY_ADDRESS" in os.environ:
        ray.init(log_to_driver=False)
        return nullcontext()
    from kvrouter.ray.local_cluster import local_ray

    return local_ray(cpus_per_node=places + 1, gpus_per_node=None if use_gpus else 0)


def main() -> None:
    """Runs the command line."""
    typer.run(run_grpo)
