"""The loss of GRPO: a clipped ratio with KL to a reference policy."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvrouter.grpo.schema import LossConfig


@dataclass
class LossTerms:
    """Means over the tokens (or sequences) that count; ``loss`` has the gradient."""

    loss: torch.Tensor
    policy_loss: torch.Tensor
    kl: torch.Tensor
    clipped: torch.Tensor
    """Share of tokens whose ratio was outside of the clip range."""


def kl_estimate(logprobs: torch.Tensor, reference: torch.Tensor, kind: str = "k3") -> torch.Tensor:
    """Estimates KL(policy || reference) for each token sampled from the policy (Schulman 2020).

    With log r = reference - logprobs: k1 = -log r, k2 = (log r)^2 / 2, k3 = r - 1 - log r.
    Raises ValueError for another kind.
    """
    log_ratio = reference - logprobs
    if kind == "k1":
        return -log_ratio
    if kind == "k2":
        return log_ratio.square() / 2
    if kind == "k3":
        return torch.expm1(log_ratio) - log_ratio
    raise ValueError(f"loss_fn.reference_policy_kl_type must be k1, k2 or k3, not {kind!r}")


def weights_of(mask: torch.Tensor, token_level: bool) -> torch.Tensor:
    """[B, T] weights that make a weighted sum the mean over all tokens, or the mean over sequences of their means.

    mask: [B, T], 1 where a token counts.  They sum to 1, or to 0 where no token counts.
    """
    mask = mask.float()
    if token_level:
        return mask / mask.sum().clamp(min=1)
    lengths = mask.sum(-1, keepdim=True)
    return mask / lengths.clamp(min=1) / (lengths > 0).sum().clamp(min=1)


def clipped_policy_loss(
    logprobs: torch.Tensor,
    previous: torch.Tensor,
    reference: torch.Tensor,
    sampled: torch.Tensor,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    config: LossConfig,
) -> LossTerms:
    """The loss of a (micro-)batch; those of a batch's parts add up to the batch's.

    logprobs, previous, reference, sampled: [B, T] of the tokens by the policy that learns, by it before this step, by
        the reference policy, and by the engine that generated them.
    advantages: [B].
    weights: [B, T], the rows of ``weights_of`` the whole batch.

    Per token, with ratio r = exp(logprobs - previous), or 1 with ``force_on_policy_ratio``, and advantage A (PPO,
    Schulman et al. 2017, eq. 7): max(-A r, -A clip(r, 1 - ratio_clip_min, 1 + ratio_clip_max)); with ``ratio_clip_c``
    at most -A c where A < 0 (dual clip, Ye et al. 2020); times exp(previous - sampled) with
    ``use_importance_sampling_correction``; plus ``reference_policy_kl_penalty`` times ``kl_estimate``.
    """
    advantages = advantages[:, None]
    # Where no token counts there may be anything: it must not become infinite, as inf * 0 is not 0.
    counts = weights > 0
    logprobs, previous, reference, sampled = (
        torch.where(counts, values, torch.zeros_like(values)) for values in (logprobs, previous, reference, sampled)
    )
    ratio = torch.exp(logprobs - (logprobs.detach() if config.force_on_policy_ratio else previous))
    bounded = ratio.clamp(1 - config.ratio_clip_min, 1 + config.ratio_clip_max)
    policy_loss = torch.maximum(-advantages * ratio, -advantages * bounded)
    if config.ratio_clip_c is not None:
        policy_loss = torch.where(
            advantages < 0, torch.minimum(policy_loss, -advantages * config.ratio_clip_c), policy_loss
        )
    if config.use_importance_sampling_correction:
        policy_loss = policy_loss * torch.exp(previous - sampled).detach()
    kl = kl_estimate(logprobs, reference, config.reference_policy_kl_type)
    policy_loss = (policy_loss * weights).sum()
    kl = (kl * weights).sum()
    clipped = ((ratio != bounded) * weights).sum()
    return LossTerms(
        policy_loss + config.reference_policy_kl_penalty * kl, policy_loss.detach(), kl.detach(), clipped.detach()
    )
