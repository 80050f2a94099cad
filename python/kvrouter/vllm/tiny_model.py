"""A small random-weight model, made locally, that a real vLLM serves with ``--load-format dummy``.

The tokenizer has one token a word (``w10 w11 ...``), so that a prompt's token ids can be read off its text.  It lives
in a folder of its own: beside a Qwen2 configuration vLLM reads any tokenizer as byte-level BPE.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEAD_SIZE = 64
FIRST_WORD = 3  # Ids below it are <s>, </s> and <unk>.


@dataclass(frozen=True)
class TinyModel:
    """Where a tiny model lies on disk."""

    path: Path
    """Folder with ``config.json``: vLLM's ``--model``."""
    tokenizer: Path
    """Folder with the tokenizer: vLLM's ``--tokenizer``."""
    vocab_size: int
    """Number of tokens; ids from 3 on are the words ``w3``, ``w4``, ..."""
    kv_bytes_per_token: int
    """Bytes of KV cache that one token takes in float32."""


def default_model_dir() -> Path:
    """Folder for models made on this machine: ``$XDG_CACHE_HOME/kvrouter`` or ``~/.cache/kvrouter``."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "kvrouter"


def make_tiny_model(
    path: str | os.PathLike[str],
    hidden_size: int = 512,
    num_layers: int = 8,
    vocab_size: int = 1024,
    max_position_embeddings: int = 8192,
) -> TinyModel:
    """Writes the configuration and the tokenizer of a random-weight Qwen2 model.

    Files that are already there with the same content are left alone, and each file is replaced in one step, so that
    several processes may call this for the same folder.

    Parameters
    ----------
    path
        Folder to write to; made when it is missing.
    hidden_size
        Width of the model, a multiple of 128 (heads of 64, two query heads a KV head).
    num_layers
        Number of layers.  With the defaults a cold prompt of 1,600 tokens costs hundreds of milliseconds on one core.
    vocab_size
        Number of tokens, more than 3.
    max_position_embeddings
        The longest sequence in tokens.

    Raises
    ------
    ValueError
        For a size that no model can have; the message names the parameter.
    """
    if hidden_size < 128 or hidden_size % 128:
        raise ValueError(f"hidden_size must be a positive multiple of 128, not {hidden_size}")
    for name, value, least in (
        ("num_layers", num_layers, 1),
        ("vocab_size", vocab_size, FIRST_WORD + 1),
        ("max_position_embeddings", max_position_embeddings, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, not {value}")
    folder = Path(path).absolute()
    num_kv_heads = hidden_size // (2 * HEAD_SIZE)
    model_config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "dtype": "float32",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": hidden_size // HEAD_SIZE,
        "num_key_value_heads": num_kv_heads,
        "max_position_embeddings": max_position_embeddings,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir(parents=True, exist_ok=True)
    _write_json(tokenizer / "tokenizer.json", _word_tokenizer(vocab_size))
    _write_json(
        tokenizer / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "model_max_length": max_position_embeddings,
        },
    )
    # Without a model type beside the tokenizer vLLM retries, and start-up takes four seconds more.  This one selects
    # the class that reads tokenizer.json as it is.
    _write_json(tokenizer / "config.json", {"model_type": "llama"})
    _write_json(folder / "config.json", model_config)
    return TinyModel(folder, tokenizer, vocab_size, 2 * num_layers * num_kv_heads * HEAD_SIZE * 4)


def _word_tokenizer(vocab_size: int) -> dict[str, Any]:
    special = ["<s>", "</s>", "<unk>"]
    vocab = {word: index for index, word in enumerate(special)}
    vocab.update({f"w{index}": index for index in range(FIRST_WORD, vocab_size)})
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": word, **flags} for index, word in enumerate(special)],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=1) + "\n"
    try:
        if path.read_text(encoding="utf-8") == text:
            return
    except (OSError, UnicodeDecodeError):
        pass
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as temporary:
        temporary.write(text)
    # The temporary file is private; a model is for whoever may read its folder.
    Path(temporary.name).chmod(0o644)
    Path(temporary.name).replace(path)
