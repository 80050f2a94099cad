"""Advantages of GRPO: a sample's reward beside those of its prompt's other samples."""

from __future__ import annotations

import torch


def group_relative_advantages(
    rewards: torch.Tensor,
    num_generations: int,
    *,
    leave_one_out: bool = True,
    normalize: bool = True,
    clip_low: float | None = None,
    clip_high: float | None = None,
    epsilon: float = 1e-6,
) -> torch.Tensor:
    """How much better each sample is than its group.

    rewards: [B]; rows ``k * num_generations`` to ``(k + 1) * num_generations - 1`` are the samples of prompt k.
    leave_one_out: the baseline is the mean of the group's other samples (Kool et al. 2019, RLOO; needs two samples a
        prompt); false: of all (Shao et al. 2024, arXiv:2402.03300, section 4.1).
    normalize: divides by the standard deviation (of a sample, Bessel-corrected) of what the baseline is the mean of,
        plus ``epsilon``; where that deviation is 0 (all alike), the advantage stays as it is.
    clip_low, clip_high: bounds.

    Returns [B].  Raises ValueError for sizes that do not fit.
    """
    if rewards.ndim != 1 or num_generations < 1 or len(rewards) % num_generations:
        raise ValueError(f"rewards must be [B], B a multiple of {num_generations}, not {list(rewards.shape)}")
    if leave_one_out and num_generations < 2:
        raise ValueError(
            "grpo.use_leave_one_out_baseline needs grpo.num_generations_per_prompt of at least 2: set it to false"
        )
    groups = rewards.double().reshape(-1, num_generations)
    if leave_one_out:
        others = _others(groups)
        advantages = groups - others.mean(-1)
        deviation = _deviation(others)
    else:
        advantages = groups - groups.mean(-1, keepdim=True)
        deviation = _deviation(groups)[:, None].expand_as(groups)
    if normalize:
        advantages = torch.where(deviation > 0, advantages / (deviation + epsilon), advantages)
    if clip_low is not None or clip_high is not None:
        advantages = advantages.clamp(clip_low, clip_high)
    return advantages.reshape(-1).to(rewards.dtype)


def _others(groups: torch.Tensor) -> torch.Tensor:
    """[K, G] to [K, G, G - 1]: for each sample, the rewards of the others."""
    size = groups.shape[1]
    others = torch.arange(size).expand(size, size)[~torch.eye(size, dtype=torch.bool)].reshape(size, size - 1)
    return groups[:, others.to(groups.device)]


def _deviation(values: torch.Tensor) -> torch.Tensor:
    """Over the last dimension; exactly 0 where all are alike or there is one, whatever the rounding of the mean."""
    if values.shape[-1] < 2:
        return torch.zeros_like(values[..., 0])
    alike = (values == values[..., :1]).all(-1)
    return torch.where(alike, torch.zeros_like(values[..., 0]), values.std(-1))
