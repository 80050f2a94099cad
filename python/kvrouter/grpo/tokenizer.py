"""Text to token ids and back: any tokenizer of transformers, or one of single characters for the tiny model."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

_SPECIAL = ["<s>", "</s>", "<unk>"]  # the ids that make_tiny_model's config has for them


class TextTokenizer:
    """A tokenizer of transformers, as the training uses it: no special tokens are added or decoded."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        if tokenizer.eos_token_id is None:
            raise ValueError("policy.tokenizer.name: the tokenizer has no end token")
        self.eos_id = int(tokenizer.eos_token_id)
        self.pad_id = self.eos_id if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def save(self, folder: str) -> None:
        """Writes it where ``load_tokenizer`` reads it."""
        self._tokenizer.save_pretrained(folder)


def load_tokenizer(name: str) -> TextTokenizer:
    """The tokenizer of a folder or name; raises ValueError when there is none."""
    try:
        return TextTokenizer(AutoTokenizer.from_pretrained(name))
    except (OSError, ValueError) as error:
        raise ValueError(f"policy.tokenizer.name: {name} cannot be loaded: {error}") from None


def character_tokenizer() -> TextTokenizer:
    """One token a printable ASCII character, and three special ones."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    words = [*_SPECIAL, *string.printable]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return TextTokenizer(
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
            clean_up_tokenization_spaces=False,
        )
    )


#: Size of the tiny model's vocabulary; a few ids stand for nothing.
CHARACTER_VOCAB_SIZE = 128
