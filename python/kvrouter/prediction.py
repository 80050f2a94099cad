"""What a predicted overlap means in tokens."""

from __future__ import annotations


def expected_cached_tokens(predicted_blocks: int, num_tokens: int, block_size: int) -> int:
    """Tokens that a worker takes from its cache if it holds `predicted_blocks` leading blocks of a prompt.

    The one correction: vLLM always computes at least the last token of a prompt, so it serves at most
    ``num_tokens - 1`` tokens from cache, in whole blocks.
    """
    return min(predicted_blocks, (num_tokens - 1) // block_size) * block_size
