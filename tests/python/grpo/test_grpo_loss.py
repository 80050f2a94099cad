"""The clipped loss against its definition, token by token in plain Python."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="torch is not installed: run scripts/install_vllm.py")
pytest.importorskip("omegaconf", reason="OmegaConf is not installed: pip install 'kvrouter[grpo]'")

from kvrouter.grpo.loss import clipped_policy_loss, kl_estimate, weights_of  # noqa: E402
from kvrouter.grpo.schema import LossConfig  # noqa: E402

CONFIGS = st.builds(
    LossConfig,
    reference_policy_kl_penalty=st.sampled_from([0.0, 0.01, 1.0]),
    reference_policy_kl_type=st.sampled_from(["k1", "k2", "k3"]),
    ratio_clip_min=st.sampled_from([0.1, 0.2]),
    ratio_clip_max=st.sampled_from([0.2, 0.28]),
    ratio_clip_c=st.sampled_from([None, 1.5, 3.0]),
    force_on_policy_ratio=st.booleans(),
    use_importance_sampling_correction=st.booleans(),
    token_level_loss=st.booleans(),
)


def batch(seed, rows=3, width=4):
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(rows, width, generator=generator, dtype=torch.float64) - 1 for _ in range(4)]
    advantages = torch.randn(rows, generator=generator, dtype=torch.float64)
    mask = torch.rand(rows, width, generator=generator) > 0.4
    return values, advantages, mask


def of_token(now, before, reference, sampled, advantage, config):
    ratio = 1.0 if config.force_on_policy_ratio else math.exp(now - before)
    bounded = min(max(ratio, 1 - config.ratio_clip_min), 1 + config.ratio_clip_max)
    loss = max(-advantage * ratio, -advantage * bounded)
    if config.ratio_clip_c is not None and advantage < 0:
        loss = min(loss, -advantage * config.ratio_clip_c)
    if config.use_importance_sampling_correction:
        loss *= math.exp(before - sampled)
    log_ratio = reference - now
    kl = {"k1": -log_ratio, "k2": log_ratio**2 / 2, "k3": math.exp(log_ratio) - 1 - log_ratio}
    return loss + config.reference_policy_kl_penalty * kl[config.reference_policy_kl_type]


def by_definition(values, advantages, mask, config):
    rows = []
    for row in range(len(advantages)):
        rows.append(
            [
                of_token(*(value[row, column].item() for value in values), advantages[row].item(), config)
                for column in range(mask.shape[1])
                if mask[row, column]
            ]
        )
    if config.token_level_loss:
        tokens = [value for row in rows for value in row]
        return sum(tokens) / max(len(tokens), 1)
    means = [sum(row) / len(row) for row in rows if row]
    return sum(means) / max(len(means), 1)


@given(st.integers(0, 10_000), CONFIGS)
def test_is_its_definition(seed, config):
    values, advantages, mask = batch(seed)
    terms = clipped_policy_loss(*values, advantages, weights_of(mask, config.token_level_loss), config)
    assert math.isclose(terms.loss.item(), by_definition(values, advantages, mask, config), rel_tol=1e-5, abs_tol=1e-6)


@given(st.integers(0, 10_000), CONFIGS)
def test_micro_batches_add_up_with_their_gradients(seed, config):
    values, advantages, mask = batch(seed)
    weights = weights_of(mask, config.token_level_loss)
    whole = values[0].clone().requires_grad_()
    terms = clipped_policy_loss(whole, *values[1:], advantages, weights, config)
    terms.loss.backward()
    parts = values[0].clone().requires_grad_()
    total = 0.0
    for row in range(len(advantages)):
        one = slice(row, row + 1)
        part = clipped_policy_loss(
            parts[one], *(value[one] for value in values[1:]), advantages[one], weights[one], config
        )
        part.loss.backward()
        total += part.loss.item()
    assert math.isclose(total, terms.loss.item(), rel_tol=1e-6, abs_tol=1e-9)
    assert torch.allclose(whole.grad, parts.grad)


def test_on_policy_the_gradient_is_that_of_reinforce():
    values, advantages, mask = batch(3)
    now = values[0].clone().requires_grad_()
    weights = weights_of(mask, True)
    config = LossConfig(reference_policy_kl_penalty=0.0)
    clipped_policy_loss(now, values[0], values[2], values[3], advantages, weights, config).loss.backward()
    assert torch.allclose(now.grad, -advantages[:, None] * weights.double())


def test_forced_on_policy_the_gradient_is_that_of_reinforce_wherever_it_was_sampled():
    values, advantages, mask = batch(3)
    now = values[0].clone().requires_grad_()
    weights = weights_of(mask, True)
    config = LossConfig(reference_policy_kl_penalty=0.0, force_on_policy_ratio=True)
    clipped_policy_loss(now, *values[1:], advantages, weights, config).loss.backward()
    assert torch.allclose(now.grad, -advantages[:, None] * weights.double())


def test_a_ratio_out_of_range_has_no_gradient():
    now = torch.tensor([[0.5]], requires_grad=True)
    zero = torch.zeros(1, 1)
    config = LossConfig(reference_policy_kl_penalty=0.0)
    terms = clipped_policy_loss(now, zero, zero, zero, torch.ones(1), torch.ones(1, 1), config)
    terms.loss.backward()
    assert now.grad.item() == 0.0
    assert terms.clipped.item() == 1.0


def test_what_does_not_count_may_be_anything():
    values, advantages, mask = batch(5)
    weights = weights_of(mask, True)
    expected = clipped_policy_loss(*values, advantages, weights, LossConfig()).loss
    wild = [torch.where(mask, value, torch.full_like(value, -float("inf"))) for value in values]
    now = wild[0].requires_grad_()
    loss = clipped_policy_loss(now, *wild[1:], advantages, weights, LossConfig()).loss
    loss.backward()
    assert torch.allclose(loss, expected)
    assert now.grad.isfinite().all()


def test_weights_of_nothing_are_nothing():
    for token_level in (True, False):
        assert not weights_of(torch.zeros(2, 3), token_level).any()
        assert weights_of(torch.tensor([[1, 1, 0], [0, 0, 0]]), token_level).tolist() == [[0.5, 0.5, 0], [0, 0, 0]]


def test_kl_estimates():
    for kind in ("k2", "k3"):
        assert kl_estimate(torch.tensor([-1.0]), torch.tensor([-2.0]), kind) > 0
        assert kl_estimate(torch.tensor([-1.0]), torch.tensor([-1.0]), kind) == 0
    with pytest.raises(ValueError, match="k1, k2 or k3"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")
