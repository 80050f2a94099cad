"""The policy: a causal model of transformers, its reference, and AdamW."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kvrouter.grpo.loss import clipped_policy_loss, weights_of
from kvrouter.grpo.schema import LossConfig, PolicyConfig
from kvrouter.grpo.sequences import SequenceBatch


class Policy:
    """A model that learns, in float32, and the reference that KL holds it near: the model as training began.

    config: see ``PolicyConfig``.
    model_path: the folder or name of the model.
    random_weights: make the weights from torch's random state instead of reading them.
    """

    def __init__(self, config: PolicyConfig, model_path: str, random_weights: bool) -> None:
        self.config = config
        if random_weights:
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_path))
        else:
            model = AutoModelForCausalLM.from_pretrained(model_path)
        self.device = torch.device(config.device)
        self.model = model.float().to(self.device).eval()  # no dropout: the ratio must be 1 where nothing has changed
        self.reference = self.model
        try:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), **config.optimizer.kwargs)
        except (TypeError, ValueError) as error:
            raise ValueError(f"policy.optimizer.kwargs: {error}") from None

    def freeze_reference(self) -> None:
        """Makes the model as it is now the reference."""
        self.reference = copy.deepcopy(self.model).requires_grad_(False)

    def weights(self) -> dict[str, torch.Tensor]:
        """What the engines are given."""
        return {name: tensor.detach() for name, tensor in self.model.state_dict().items()}

    # --- probabilities ---

    def logprobs(self, batch: SequenceBatch, reference: bool = False) -> torch.Tensor:
        """[B, W] log-probability of each token after those before it, at the sampling temperature; 0 for the first.

        reference: by the reference instead of the policy.
        """
        model = self.reference if reference else self.model
        result = torch.zeros(batch.ids.shape)
        with torch.no_grad():
            for start in range(0, len(batch), self.config.logprob_batch_size):
                part = batch.rows(start, start + self.config.logprob_batch_size)
                result[start : start + len(part), : part.ids.shape[1]] = self._logprobs(model, part).cpu()
        return result

    def _logprobs(self, model: Any, batch: SequenceBatch) -> torch.Tensor:
        ids = batch.ids.to(self.device)
        attended = torch.arange(ids.shape[1], device=self.device) < batch.lengths.to(self.device)[:, None]
        logits = model(input_ids=ids, attention_mask=attended.long(), use_cache=False).logits[:, :-1]
        distribution = torch.log_softmax(logits.float() / self.config.generation.temperature, -1)
        chosen = distribution.gather(-1, ids[:, 1:, None])[..., 0]
        return torch.nn.functional.pad(chosen, (1, 0))

    # --- learning ---

    def train(
        self,
        batch: SequenceBatch,
        advantages: torch.Tensor,
        previous: torch.Tensor,
        reference: torch.Tensor,
        sampled: torch.Tensor,
        loss_config: LossConfig,
    ) -> dict[str, float]:
        """Optimizer steps over all of the batch, ``train_global_batch_size`` samples each.

        advantages: [B]; previous, reference, sampled: [B, W], see ``clipped_policy_loss``.
        Returns loss, policy_loss, kl, clip_fraction, grad_norm (before it is clipped), each the optimizer steps' mean.
        Raises ValueError when the batch is no multiple of ``policy.train_global_batch_size``.
        """
        size = self.config.train_global_batch_size or len(batch)
        if len(batch) % size:
            raise ValueError(f"policy.train_global_batch_size ({size}) must divide the step's {len(batch)} samples")
        sums: dict[str, float] = {}
        steps = len(batch) // size
        for start in range(0, len(batch), size):
            weights = weights_of(batch.mask[start : start + size], loss_config.token_level_loss)
            self.optimizer.zero_grad(set_to_none=True)
            for offset in range(0, size, self.config.train_micro_batch_size):
                first, last = start + offset, min(start + offset + self.config.train_micro_batch_size, start + size)
                part = batch.rows(first, last)
                width = part.ids.shape[1]
                terms = clipped_policy_loss(
                    self._logprobs(self.model, part),
                    previous[first:last, :width].to(self.device),
                    reference[first:last, :width].to(self.device),
                    sampled[first:last, :width].to(self.device),
                    advantages[first:last].to(self.device),
                    weights[first - start : last - start, :width].to(self.device),
                    loss_config,
                )
                terms.loss.backward()
                for name, term in vars(terms).items():
                    sums[name] = sums.get(name, 0.0) + term.item()
            sums["grad_norm"] = sums.get("grad_norm", 0.0) + self.apply_gradients()
        sums["clip_fraction"] = sums.pop("clipped")
        return {name: total / steps for name, total in sums.items()}

    def apply_gradients(self) -> float:
        """Scales gradients down to ``policy.max_grad_norm``, and has AdamW apply them; returns their norm before."""
        limit = self.config.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), float("inf") if limit is None else limit)
        self.optimizer.step()
        return float(norm)

    # --- state ---

    def state(self) -> dict[str, Any]:
        """All that a resumed training needs of it."""
        return {
            "model": self.model.state_dict(),
            "reference": self.reference.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Becomes what it was at ``state()``."""
        self.model.load_state_dict(state["reference"])
        self.freeze_reference()
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
