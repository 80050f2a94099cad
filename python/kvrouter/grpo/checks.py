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
    _check_generation(config)


def _check_generation(config: MasterConfig) -> None:
    generation = config.policy.generation
    if generation.temperature <= 0:
        raise ValueError(f"policy.generation.temperature must be above 0, got {generation.temperature}")
    if generation.top_p != 1.0 or generation.top_k is not None:
        raise ValueError(
            "policy.generation.top_p must be 1 and top_k null: the policy's log-probabilities are over all tokens, and "
            "the loss compares them with the engines'"
        )
    if generation.stop_strings and config.policy.model_name == "tiny":
        raise ValueError(
            "policy.generation.stop_strings needs a tokenizer in the engines: the tiny model has none there"
        )
    if generation.backend != "vllm":
        if router_enabled(router_config_from(asdict(config))):
            logger.warning("Router is only supported with vLLM backend")
        raise ValueError(f"policy.generation.backend must be 'vllm', not {generation.backend!r}")


def _check_algorithm(config: MasterConfig) -> None:
    grpo = config.grpo
    if grpo.seed < 0:
        raise ValueError(f"grpo.seed must be at least 0, got {grpo.seed}")
    if grpo.use_leave_one_out_baseline and grpo.num_generations_per_prompt < 2:
        raise ValueError("grpo.use_leave_one_out_baseline needs grpo.num_generations_per_prompt of at least 2")
    samples = grpo.num_prompts_per_step * grpo.num_generations_per_prompt
    if samples % (config.policy.train_global_batch_size or samples):
        raise ValueError(
            f"policy.train_global_batch_size ({config.policy.train_global_batch_size}) must divide the {samples} "
            "samples of a step (grpo.num_prompts_per_step * grpo.num_generations_per_prompt)"
        )
    if grpo.async_grpo.enabled:
        check_async(config)


def check_async(config: MasterConfig) -> None:
    """Raises ValueError when rollouts beside training would be learnt from as if they were the policy's."""
    if not config.loss_fn.use_importance_sampling_correction:
        raise ValueError("grpo.async_grpo needs loss_fn.use_importance_sampling_correction=true: samples are older")
