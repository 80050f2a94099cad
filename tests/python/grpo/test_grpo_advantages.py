"""Group-relative advantages against their definition."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="torch is not installed: run scripts/install_vllm.py")
pytest.importorskip("omegaconf", reason="OmegaConf is not installed: pip install 'kvrouter[grpo]'")

from kvrouter.grpo.advantages import group_relative_advantages  # noqa: E402

# Rewards of some size apart, so that a definition in plain Python is exact enough beside it.
REWARDS = st.integers(-8, 8).map(lambda value: value / 4)


@st.composite
def groups(draw):
    size = draw(st.integers(2, 6))
    return draw(st.lists(st.lists(REWARDS, min_size=size, max_size=size), min_size=1, max_size=4))


def by_definition(group, leave_one_out, normalize):
    advantages = []
    for index, reward in enumerate(group):
        baseline = group[:index] + group[index + 1 :] if leave_one_out else group
        advantage = reward - sum(baseline) / len(baseline)
        deviation = statistics.stdev(baseline) if len(baseline) > 1 else 0.0
        advantages.append(advantage / (deviation + 1e-6) if normalize and deviation > 0 else advantage)
    return advantages


@given(groups(), st.booleans(), st.booleans())
def test_is_its_definition(rewards, leave_one_out, normalize):
    size = len(rewards[0])
    flat = torch.tensor([reward for group in rewards for reward in group], dtype=torch.float64)
    result = group_relative_advantages(flat, size, leave_one_out=leave_one_out, normalize=normalize).tolist()
    expected = [value for group in rewards for value in by_definition(group, leave_one_out, normalize)]
    assert all(math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9) for a, b in zip(result, expected, strict=True))


@given(groups(), REWARDS)
def test_a_constant_added_to_a_group_changes_nothing(rewards, constant):
    flat = torch.tensor([reward for group in rewards for reward in group], dtype=torch.float64)
    size = len(rewards[0])
    assert torch.allclose(group_relative_advantages(flat, size), group_relative_advantages(flat + constant, size))


@given(groups())
def test_without_normalisation_a_groups_advantages_sum_to_zero(rewards):
    flat = torch.tensor([reward for group in rewards for reward in group], dtype=torch.float64)
    size = len(rewards[0])
    for leave_one_out in (True, False):
        sums = (
            group_relative_advantages(flat, size, leave_one_out=leave_one_out, normalize=False)
            .reshape(-1, size)
            .sum(-1)
        )
        assert torch.allclose(sums, torch.zeros_like(sums), atol=1e-12)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1])
def test_a_group_all_alike_teaches_nothing(reward):
    for leave_one_out in (True, False):
        result = group_relative_advantages(torch.full((8,), reward), 4, leave_one_out=leave_one_out)
        assert result.abs().max() < 1e-6


def test_bounds():
    rewards = torch.tensor([0.0, 0.0, 0.0, 1.0])
    assert group_relative_advantages(rewards, 4, clip_low=-0.1, clip_high=0.5).tolist()[-1] == 0.5
    assert group_relative_advantages(rewards, 4, clip_low=-0.1).min() >= -0.1 - 1e-6


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="multiple of 3"):
        group_relative_advantages(torch.zeros(4), 3)
    with pytest.raises(ValueError, match=r"num_generations_per_prompt of at least 2"):
        group_relative_advantages(torch.zeros(4), 1)
    assert group_relative_advantages(torch.ones(4), 1, leave_one_out=False).tolist() == [0.0] * 4
