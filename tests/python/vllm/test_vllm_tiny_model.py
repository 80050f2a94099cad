"""make_tiny_model: files that the model libraries read as they are meant."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvrouter.vllm.tiny_model import make_tiny_model


def test_make_tiny_model_again_leaves_identical_files_alone(tmp_path):
    first = make_tiny_model(tmp_path / "model", num_layers=2)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    assert len(times) == 4
    assert make_tiny_model(tmp_path / "model", num_layers=2) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")} == times


def test_make_tiny_model_other_size_or_damaged_file_is_written_anew(tmp_path):
    model = make_tiny_model(tmp_path, num_layers=2)
    (model.tokenizer / "tokenizer.json").write_bytes(b"\xff\xfe not json")
    model = make_tiny_model(tmp_path, num_layers=3)
    assert json.loads((model.path / "config.json").read_text())["num_hidden_layers"] == 3
    assert json.loads((model.tokenizer / "tokenizer.json").read_text())["model"]["vocab"]["w1023"] == 1023


def test_make_tiny_model_from_many_threads_at_once_leaves_whole_files_only(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: make_tiny_model(tmp_path, num_layers=2), range(32)))
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert names == [
        "config.json",
        "tokenizer/config.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
    ]
    for name in names:
        json.loads((tmp_path / name).read_text())


def test_make_tiny_model_kv_bytes_are_keys_and_values_of_all_layers_in_float32(tmp_path):
    model = make_tiny_model(tmp_path, hidden_size=256, num_layers=3)
    config = json.loads((model.path / "config.json").read_text())
    head_size = config["hidden_size"] // config["num_attention_heads"]
    assert model.kv_bytes_per_token == 2 * 3 * config["num_key_value_heads"] * head_size * 4


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": 320}, "hidden_size"),
        ({"num_layers": 0}, "num_layers"),
        ({"vocab_size": 3}, "vocab_size"),
        ({"max_position_embeddings": 0}, "max_position_embeddings"),
    ],
)
def test_make_tiny_model_impossible_size_names_the_parameter(tmp_path, settings, name):
    with pytest.raises(ValueError, match=name):
        make_tiny_model(tmp_path, **settings)


def test_make_tiny_model_tokenizer_has_one_token_a_word(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(make_tiny_model(tmp_path).tokenizer))
    assert tokenizer("w10 w11 w1023 elsewhere")["input_ids"] == [10, 11, 1023, 2]
    assert tokenizer.decode([10, 11, 1023]) == "w10 w11 w1023"
    assert transformers.AutoConfig.from_pretrained(str(tmp_path)).num_hidden_layers == 8
