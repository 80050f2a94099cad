"""Episodes: which tokens stand where, what counts, and when a conversation ends."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="torch is not installed: run scripts/install_vllm.py")
pytest.importorskip("transformers", reason="transformers is not installed: run scripts/install_vllm.py")
pytest.importorskip("omegaconf", reason="OmegaConf is not installed: pip install 'kvrouter[grpo]'")

from kvrouter.grpo.data import Problem  # noqa: E402
from kvrouter.grpo.environment import ExactAnswerEnvironment  # noqa: E402
from kvrouter.grpo.rollout import Limits, as_batch, roll_out  # noqa: E402
from kvrouter.grpo.schema import ExactAnswerConfig  # noqa: E402
from kvrouter.grpo.tokenizer import character_tokenizer  # noqa: E402

TOKENIZER = character_tokenizer()
ENVIRONMENT = ExactAnswerEnvironment(ExactAnswerConfig())


class Echo:
    """Answers each prompt with its last ``length`` tokens, in any order; remembers the seeds it was given."""

    def __init__(self, length):
        self.length = length
        self.version = 0
        self.seeds = []

    async def generate_batch(self, data, greedy=False):
        await asyncio.sleep(0)
        self.version += 1
        self.seeds += data["seeds"].tolist()
        rows, lengths = data["input_ids"], data["input_lengths"].tolist()
        ids = torch.zeros(len(rows), rows.shape[1] + self.length, dtype=torch.long)
        logprobs = torch.zeros(ids.shape)
        for row, length in enumerate(lengths):
            ids[row, :length] = rows[row, :length]
            ids[row, length : length + self.length] = rows[row, length - self.length : length]
            logprobs[row, length : length + self.length] = -0.5 * torch.arange(1, self.length + 1)
        size = len(rows)
        return {
            "output_ids": ids,
            "logprobs": logprobs,
            "unpadded_sequence_lengths": torch.tensor(lengths) + self.length,
            "truncated": torch.zeros(size, dtype=torch.bool),
            "num_cached_tokens": torch.tensor(lengths) - 1,
            "weight_version": torch.full((size,), self.version),
            "gen_leader_worker_idx": [self.version % 2] * size,
            "overlap_blocks": [None] * size,
            "router_s": torch.zeros(size),
        }

    async def generate_async(self, data, greedy=False):
        for row in reversed(range(len(data["input_ids"]))):
            one = {name: column[row : row + 1] for name, column in data.items()}
            yield row, await self.generate_batch(one, greedy)


TEXTS = st.text("0123456789+=", min_size=2, max_size=9)
PROBLEMS = st.integers(1, 4).flatmap(
    lambda turns: st.builds(
        lambda questions, answers: Problem(tuple(questions), tuple(answers)),
        st.lists(TEXTS, min_size=turns, max_size=turns),
        st.lists(TEXTS, min_size=turns, max_size=turns),
    )
)


@settings(deadline=None)
@given(st.lists(PROBLEMS, min_size=1, max_size=5), st.integers(1, 2), st.integers(1, 4))
def test_an_episode_is_its_conversation(problems, length, max_turns):
    generation = Echo(length)
    seeds = list(range(100, 100 + len(problems)))
    limits = Limits(10_000, max_turns)
    episodes = asyncio.run(roll_out(generation, ENVIRONMENT, problems, TOKENIZER, limits, seeds=seeds))
    rollout = as_batch(episodes, TOKENIZER.pad_id, 1.0)
    for row, (episode, problem) in enumerate(zip(episodes, problems, strict=True)):
        text, prompt_tokens = problem.prompt, 0
        turns = min(max_turns, len(problem.answers))
        spoken, right = [], 0
        for turn in range(turns):
            prompt_tokens += len(text)
            response = text[-length:]
            spoken += range(len(text), len(text) + length)
            text += response
            feedback = ENVIRONMENT.respond(problem, turn, response)
            right += feedback.correct
            if turn + 1 < turns:
                text += feedback.observation
        assert TOKENIZER.decode(episode.tokens) == text
        assert rollout.batch.lengths[row] == len(text)
        assert rollout.batch.mask[row].nonzero()[:, 0].tolist() == spoken
        assert rollout.sampled[row][rollout.batch.mask[row]].tolist() == [-0.5 * (i + 1) for i in range(length)] * turns
        assert not rollout.sampled[row][~rollout.batch.mask[row]].any()
        assert rollout.rewards[row].item() == pytest.approx(right / turns)
        assert (episode.prompt_tokens, episode.cached_tokens) == (prompt_tokens, prompt_tokens - turns)
        assert len(episode.workers) == turns
    assert len(set(generation.seeds)) == len(generation.seeds)  # no turn repeats another's random numbers


def test_a_conversation_too_long_ends_and_a_prompt_too_long_is_an_error():
    problem = Problem(("12345", "67890"), ("1", "2"))
    (episode,) = asyncio.run(roll_out(Echo(1), ENVIRONMENT, [problem], TOKENIZER, Limits(8, 2), seeds=[1]))
    assert (len(episode.responses), episode.truncated, episode.reward) == (1, True, 0.0)
    with pytest.raises(ValueError, match="a prompt has 5 tokens, and 4 are allowed"):
        asyncio.run(roll_out(Echo(1), ENVIRONMENT, [problem], TOKENIZER, Limits(4, 2), seeds=[1]))


def test_what_an_engine_fails_with_is_raised():
    class Failing(Echo):
        async def generate_batch(self, data, greedy=False):
            if self.version == 3:
                raise RuntimeError("lost")
            return await super().generate_batch(data, greedy)

    problems = [Problem(("11", "22"), ("1", "2"))] * 3
    with pytest.raises(RuntimeError, match="lost"):
        asyncio.run(roll_out(Failing(1), ENVIRONMENT, problems, TOKENIZER, Limits(99, 2), seeds=[1, 2, 3]))
