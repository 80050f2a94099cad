"""Problems, tokens, rewards, and checkpoints on disk."""

from __future__ import annotations

import json
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="torch is not installed: run scripts/install_vllm.py")
pytest.importorskip("transformers", reason="transformers is not installed: run scripts/install_vllm.py")
pytest.importorskip("omegaconf", reason="OmegaConf is not installed: pip install 'kvrouter[grpo]'")

from kvrouter.grpo.checkpoint import checkpoints, load_newest, save_checkpoint  # noqa: E402
from kvrouter.grpo.data import Problem, load_dataset, problems_of_step  # noqa: E402
from kvrouter.grpo.environment import ExactAnswerEnvironment, Feedback  # noqa: E402
from kvrouter.grpo.schema import DatasetConfig, ExactAnswerConfig  # noqa: E402
from kvrouter.grpo.tokenizer import CHARACTER_VOCAB_SIZE, character_tokenizer, load_tokenizer  # noqa: E402
from kvrouter.grpo.warmup import answer_mask, solved_batch  # noqa: E402

TOKENIZER = character_tokenizer()


def test_sums_are_right_and_share_long_prefixes():
    problems = load_dataset(DatasetConfig(size=40, num_prefixes=4, num_shots=30, max_operand=12, seed=3), "data.train")
    prefixes = set()
    for problem in problems:
        *shots, question = problem.prompt.split("\n")
        for line in [*shots, question + problem.answers[0]]:
            a, b, total = map(int, line.replace("+", " ").replace("=", " ").split())
            assert a + b == total
            assert 0 <= a <= 12
        assert len(shots) == 30
        prefixes.add(tuple(shots))
    assert len(prefixes) == 4
    assert problems == load_dataset(DatasetConfig(size=40, num_shots=30, max_operand=12, seed=3), "data.train")
    assert problems != load_dataset(DatasetConfig(size=40, num_shots=30, max_operand=12, seed=4), "data.train")


@given(st.integers(1, 20), st.integers(1, 7), st.integers(1, 5), st.booleans(), st.integers(0, 3))
def test_every_problem_once_an_epoch(size, count, steps, shuffle, seed):
    problems = [Problem((str(index),), ("",)) for index in range(size)]
    drawn = [p for step in range(steps) for p in problems_of_step(problems, step, count, shuffle, seed)]
    assert len(drawn) == steps * count
    for start in range(0, len(drawn) - size + 1, size):
        epoch = drawn[start : start + size]
        assert set(epoch) == set(problems)
        if not shuffle:
            assert epoch == problems


def test_jsonl(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text('{"q": "1+1=", "a": "2"}\n\n{"q": "x", "a": "y", "more": 1}\n{"q": ["a", "b"], "a": ["c", "d"]}')
    config = DatasetConfig("jsonl", data_path=str(path), input_key="q", output_key="a")
    assert load_dataset(config, "data.train") == [
        Problem(("1+1=",), ("2",)),
        Problem(("x",), ("y",)),
        Problem(("a", "b"), ("c", "d")),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ('{"input": "a", "output": "b"}\nnonsense', "own.jsonl:2 is not JSON"),
        ('{"input": "a"}', "own.jsonl:1 must be an object whose 'output' is a text"),
        ('{"input": "", "output": "b"}', "whose 'input' is a text"),
        ("[1]", "own.jsonl:1 must be an object"),
        ('{"input": ["a", "b"], "output": "c"}', "own.jsonl:1 has 2 'input' and 1 'output'"),
        ('{"input": [], "output": []}', "whose 'input' is a text, or a list of texts"),
    ],
)
def test_jsonl_that_does_not_fit(tmp_path, text, message):
    path = tmp_path / "own.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_dataset(DatasetConfig("jsonl", data_path=str(path)), "data.train")


def test_conversations_of_sums():
    config = DatasetConfig(
        "arithmetic_turns", size=6, num_prefixes=2, num_shots=10, min_turns=3, num_turns=3, num_shots_per_turn=4
    )
    problems = load_dataset(config, "data.train")
    assert len({problem.prompt.rpartition("\n")[0] for problem in problems}) == 2
    for problem in problems:
        assert [question.count("\n") for question in problem.questions] == [10, 4, 4]
        for question, answer in zip(problem.questions, problem.answers, strict=True):
            a, b = map(int, question.rpartition("\n")[2].rstrip("=").split("+"))
            assert answer == str(a + b)
        assert problem.first_turns(2) == Problem(problem.questions[:2], problem.answers[:2])
        assert problem.first_turns(9) == problem


def test_the_environment_answers_in_a_conversation():
    environment = ExactAnswerEnvironment(ExactAnswerConfig())
    problem = Problem(("1+1=", "2+2="), ("2", "4"))
    assert environment.respond(problem, 0, "2\n") == Feedback(1.0, True, "ok\n2+2=")
    assert environment.respond(problem, 0, "3\n") == Feedback(0.0, False, "no: 2\n2+2=")
    assert environment.respond(problem, 1, "4\n") == Feedback(1.0, True, None)


def test_datasets_that_cannot_be():
    with pytest.raises(ValueError, match=r"set data\.train\.data_path"):
        load_dataset(DatasetConfig("jsonl"), "data.train")
    with pytest.raises(ValueError, match="cannot be read"):
        load_dataset(DatasetConfig("jsonl", data_path="/no/such/file"), "data.train")
    with pytest.raises(ValueError, match=r"data\.train\.size must be at least 1, got 0"):
        load_dataset(DatasetConfig(size=0), "data.train")


def test_rewards():
    environment = ExactAnswerEnvironment(ExactAnswerConfig(correct_reward=2.0, wrong_reward=-1.0))
    problem = Problem(("",), ("12",))
    feedback = [environment.respond(problem, 0, response) for response in ("12", " 12\n", "1", "123", "")]
    assert [one.reward for one in feedback] == [2.0, 2.0, -1.0, -1.0, -1.0]
    assert [one.correct for one in feedback] == [True, True, False, False, False]
    assert all(one.observation is None for one in feedback)
    with pytest.raises(ValueError, match="must be above wrong_reward"):
        ExactAnswerEnvironment(ExactAnswerConfig(0.0, 0.0))


# Without "<", as "<s>" is a token.
@given(st.text(string.printable.replace("<", ""), max_size=30))
def test_a_character_is_a_token(text):
    tokens = TOKENIZER.encode(text)
    assert len(tokens) == len(text)
    assert TOKENIZER.decode(tokens) == text
    assert max(tokens, default=0) < CHARACTER_VOCAB_SIZE


def test_the_tokenizer_can_be_saved(tmp_path):
    TOKENIZER.save(str(tmp_path))
    again = load_tokenizer(str(tmp_path))
    assert again.encode("3+4=\n") == TOKENIZER.encode("3+4=\n")
    assert (again.eos_id, again.pad_id) == (TOKENIZER.eos_id, TOKENIZER.pad_id)
    with pytest.raises(ValueError, match=r"policy.tokenizer.name: .*none cannot be loaded"):
        load_tokenizer(str(tmp_path / "none"))


def test_what_the_warm_up_learns_from_is_the_answers():
    (end,), (equals,) = TOKENIZER.encode("\n"), TOKENIZER.encode("=")
    problems = [Problem(("1+1=2\n3+9=",), ("12",)), Problem(("5+5=", "1+2=3\n7+0="), ("10", "7"))]
    batch = solved_batch(problems, ExactAnswerEnvironment(ExactAnswerConfig()), TOKENIZER, [end])
    mask = answer_mask(batch.ids, equals, end)
    learned = [TOKENIZER.decode(row[counts].tolist()) for row, counts in zip(batch.ids, mask, strict=True)]
    assert learned == ["2\n12\n", "10\n3\n7\n"]
    responses = [TOKENIZER.decode(row[counts].tolist()) for row, counts in zip(batch.ids, batch.mask, strict=True)]
    assert responses == ["12\n", "10\n7\n"]
    assert TOKENIZER.decode(batch.ids[1, : batch.lengths[1]].tolist()) == "5+5=10\nok\n1+2=3\n7+0=7\n"


def test_checkpoints(tmp_path):
    assert load_newest(tmp_path / "none") is None
    for step in (2, 10, 9):
        save_checkpoint(tmp_path, step, {"policy": {"w": torch.tensor([float(step)])}}, keep=2)
    assert [step for step, _ in checkpoints(tmp_path)] == [9, 10]
    (tmp_path / ".step_11.part").mkdir()  # of one that was interrupted
    newest = load_newest(tmp_path)
    assert (newest["step"], newest["policy"]["w"].item()) == (10, 10.0)
    (tmp_path / "step_12").mkdir()
    (tmp_path / "step_12" / "state.pt").write_bytes(json.dumps([1]).encode())
    with pytest.raises(ValueError, match=r"remove its folder, or set checkpointing\.checkpoint_dir"):
        load_newest(tmp_path)
