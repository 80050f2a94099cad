"""What a config's values must be, besides their types."""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import Any

from kvrouter.grpo.schema import MasterConfig
from kvrouter.ray.config import router_config_from, router_enabled

logger = logging.getLogger("kvrouter.grpo")

#: Keys that count something; None, where the schema allows it, is no limit.
_AT_LEAST_ONE = (
    "grpo.num_prompts_per_step",
    "grpo.num_generations_per_prompt",
    "grpo.max_num_steps",
    "grpo.max_num_epochs",
    "grpo.max_rollout_turns",
    "grpo.max_val_samples",
    "grpo.val_batch_size",
    "grpo.async_grpo.max_trajectory_age_steps",
    "policy.train_global_batch_size",
    "policy.train_micro_batch_size",
    "policy.logprob_batch_size",
    "checkpointing.save_period",
    "checkpointing.keep_top_k",
    "cluster.gpus_per_node",
    "cluster.num_nodes",
)


def check_training_config(config: MasterConfig) -> None:
    """Raises ValueError, naming the key, for values that do not fit each other."""
    for key in _AT_LEAST_ONE:
        value: Any = config
        for name in key.split("."):
            value = getattr(value, name)
        if value is not None and value < 1:
            raise ValueError(f"{key} must be at least 1, got {value}")
    _check_algorithm(config)
    generation = config.policy.generation
    if generation.temperature <= 0:
        raise ValueError(f"policy.generation.temperature must be above 0, got {generation.temperature}")
    if generation.backend != "vllm":
        if router_enabled(router_config_from(asdict(config))):
            logger.warning("Router is only supported with vLLM backend")
        raise ValueError(f"policy.generation.backend must be 'vllm', not {generation.backend!r}")


def _check_algorithm(config: MasterConfig) -> None:
    grpo = config.grpo
    if grpo.use_leave_one_out_baseline and grpo.num_generations_per_prompt < 2:
        raise ValueError("grpo.use_leave_one_out_baseline needs grpo.num_generations_per_prompt of at least 2")
    samples = grpo.num_prompts_per_step * grpo.num_generations_per_prompt
    if samples % (config.policy.train_global_batch_size or samples):
        raise ValueError(
            f"policy.train_global_batch_size ({config.policy.train_global_batch_size}) must divide the {samples} "
            "samples of a step (grpo.num_prompts_per_step * grpo.num_generations_per_prompt)"
        )
    if grpo.async_grpo.enabled and not config.loss_fn.use_importance_sampling_correction:
        raise ValueError("grpo.async_grpo needs loss_fn.use_importance_sampling_correction=true: samples are older")
