"""The policy: its log-probabilities, its learning, its state."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: run scripts/install_vllm.py")
pytest.importorskip("transformers", reason="transformers is not installed: run scripts/install_vllm.py")
pytest.importorskip("omegaconf", reason="OmegaConf is not installed: pip install 'kvrouter[grpo]'")

from kvrouter.grpo.advantages import group_relative_advantages  # noqa: E402
from kvrouter.grpo.policy import Policy  # noqa: E402
from kvrouter.grpo.schema import LossConfig, OptimizerConfig, PolicyConfig  # noqa: E402
from kvrouter.grpo.sequences import SequenceBatch, pad_rows  # noqa: E402
from kvrouter.vllm.tiny_model import make_tiny_model  # noqa: E402

VOCAB = 16


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return str(make_tiny_model(tmp_path_factory.mktemp("model"), 128, 1, VOCAB, 64).path)


def make_policy(model_path, **changes):
    torch.manual_seed(0)
    changes = {"optimizer": OptimizerConfig(kwargs={"lr": 1e-3}), **changes}
    policy = Policy(PolicyConfig(**changes), model_path, random_weights=True)
    policy.freeze_reference()
    return policy


def batch_of(prompts, responses):
    ids, lengths = pad_rows([a + b for a, b in zip(prompts, responses, strict=True)], 1)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        mask[row, len(prompt) : len(prompt) + len(response)] = True
    return SequenceBatch(ids, lengths, mask)


def test_padding_and_batch_size_change_no_logprob(model_path):
    policy = make_policy(model_path, logprob_batch_size=2)
    rows = [[3, 4, 5, 6, 7], [8, 9], [3, 10, 11]]
    batch = batch_of([[row[0]] for row in rows], [row[1:] for row in rows])
    together = policy.logprobs(batch)
    for index, row in enumerate(rows):
        with torch.no_grad():
            alone = torch.log_softmax(policy.model(torch.tensor([row[:-1]])).logits[0], -1)
        expected = alone.gather(-1, torch.tensor(row[1:])[:, None])[:, 0]
        assert torch.allclose(together[index, 1 : len(row)], expected, atol=1e-5)
    assert not together[:, 0].any()


def test_micro_batches_make_the_same_step(model_path):
    batch = batch_of([[3, 4]] * 6, [[5, 6, 7][: 1 + index % 3] for index in range(6)])
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, -2.0])
    weights = []
    for size in (6, 4, 1):
        policy = make_policy(model_path, train_micro_batch_size=size)
        logprobs = policy.logprobs(batch)
        figures = policy.train(batch, advantages, logprobs, logprobs, logprobs, LossConfig())
        assert figures["kl"] == pytest.approx(0, abs=1e-6)
        weights.append(policy.weights())
    for other in weights[1:]:
        # AdamW's first step is the rate times the gradient's sign: where that is all but 0, rounding decides.
        far = sum(int(((weights[0][name] - other[name]).abs() > 1e-4).sum()) for name in other)
        assert far < 0.001 * sum(value.numel() for value in other.values())


def test_global_batches_are_optimizer_steps(model_path):
    policy = make_policy(model_path, train_global_batch_size=2)
    batch = batch_of([[3]] * 4, [[4], [5], [6], [7]])
    logprobs = policy.logprobs(batch)
    policy.train(batch, torch.ones(4), logprobs, logprobs, logprobs, LossConfig())
    assert {int(state["step"]) for state in policy.optimizer.state.values()} == {2}
    with pytest.raises(ValueError, match=r"train_global_batch_size \(3\) must divide"):
        make_policy(model_path, train_global_batch_size=3).train(
            batch, torch.ones(4), logprobs, logprobs, logprobs, LossConfig()
        )


def test_gradients_are_clipped(model_path):
    policy = make_policy(model_path, max_grad_norm=0.5)
    (policy.model(torch.tensor([[3, 4, 5]])).logits.sum() * 100).backward()
    assert policy.apply_gradients() > 0.5
    norm = torch.stack([p.grad.norm() for p in policy.model.parameters() if p.grad is not None]).norm()
    assert float(norm) == pytest.approx(0.5, rel=1e-3)


def test_it_learns_what_is_rewarded(model_path):
    """A bandit for each of four prompts: one token is right.  Only rewards tell which."""
    policy = make_policy(model_path)
    generator = torch.Generator().manual_seed(0)
    prompts = [[3 + index] for index in range(4) for _ in range(16)]
    right = torch.tensor([10 + index for index in range(4) for _ in range(16)])
    rewards = []
    for _ in range(40):
        with torch.no_grad():
            chances = torch.softmax(policy.model(torch.tensor(prompts)).logits[:, -1], -1)
        sampled = torch.multinomial(chances, 1, generator=generator)[:, 0]
        batch = batch_of(prompts, sampled[:, None].tolist())
        reward = (sampled == right).float()
        rewards.append(float(reward.mean()))
        logprobs = policy.logprobs(batch)
        reference = policy.logprobs(batch, reference=True)
        advantages = group_relative_advantages(reward, 16)
        policy.train(batch, advantages, logprobs, reference, logprobs, LossConfig(reference_policy_kl_penalty=0.0))
    assert rewards[0] < 0.2
    assert sum(rewards[-5:]) / 5 > 0.8


def test_state_goes_round(model_path):
    batch = batch_of([[3, 4]] * 2, [[5], [6]])

    def learn(policy):
        logprobs = policy.logprobs(batch)
        reference = policy.logprobs(batch, reference=True)
        return policy.train(batch, torch.tensor([1.0, -1.0]), logprobs, reference, logprobs, LossConfig())

    policy = make_policy(model_path)
    learn(policy)
    other = make_policy(model_path)
    other.load_state(copy.deepcopy(policy.state()))  # as from a file: nothing is shared
    assert learn(policy) == learn(other)
    assert all(torch.equal(value, other.weights()[name]) for name, value in policy.weights().items())


def test_settings_that_cannot_be(model_path):
    with pytest.raises(ValueError, match=r"policy.optimizer.kwargs: .*learning_rate"):
        make_policy(model_path, optimizer=OptimizerConfig(kwargs={"learning_rate": 1}))
