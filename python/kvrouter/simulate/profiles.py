"""What a simulated worker is: the engine's settings, and how long a step takes on which hardware.

The GPU profiles are rooflines of Llama 3.1 8B in bfloat16 on published peak figures, times an efficiency:

- Model (its ``config.json`` and model card on Hugging Face, ``meta-llama/Llama-3.1-8B``): 8.03e9 parameters, 32 layers
  of width 4096, 8 KV heads of 128: weights of 16.06e9 bytes, 131,072 bytes of KV a token.
- H100 SXM (NVIDIA H100 datasheet): 989e12 dense bfloat16 FLOP/s, 3.35e12 bytes/s, 80 GB.
- A100 SXM 80GB (NVIDIA A100 datasheet): 312e12 FLOP/s, 2.039e12 bytes/s, 80 GB.
- Efficiency: half of the peak FLOP/s in prefill; 0.77 of the bandwidth in decode, as a published sweep of this model
  with vLLM on an A100 found at batch 1 (https://johnmusgrave.com/p/vllm-throughput-latency-sweep-on).

``cpu-tiny`` is of the order of the built-in model (8 layers, width 512) on one CPU core; ``calibrate`` fits one to the
machine at hand.

A step takes ``step_s + max(weights_s, compute) + attention``: reading the weights hides behind the computation or the
other way round; decode reads each context token's KV once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

_PARAMETERS = 8.03e9
_WEIGHT_BYTES = 2 * _PARAMETERS
_KV_BYTES = 131_072
_LAYERS, _WIDTH = 32, 4096
_COMPUTE_EFFICIENCY, _BANDWIDTH_EFFICIENCY = 0.5, 0.77


@dataclass(frozen=True)
class Profile:
    """One kind of worker.  Times in seconds; ``num_blocks`` KV blocks of ``block_size`` tokens."""

    name: str
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    step_s: float
    """A step, whatever it computes."""
    weights_s: float
    """The least that a step's computation of tokens takes."""
    prefill_token_s: float
    """Each token of a prompt."""
    attention_pair_s: float
    """Each pair of a token of a prompt and a token before it."""
    decode_sequence_s: float
    """Each request that gets its next token."""
    decode_pair_s: float
    """Each context token of such a request."""
    block_size: int = 64
    max_model_len: int = 32_768
    vocab_size: int = 32_000

    def with_blocks(self, num_blocks: int | None) -> Profile:
        """The same with another cache size; None: as it is."""
        if num_blocks is None:
            return self
        room = (num_blocks - 1) * self.block_size
        return replace(self, num_blocks=num_blocks, max_model_len=min(self.max_model_len, room))


def _gpu(name: str, flops: float, bandwidth: float, max_num_seqs: int, max_num_batched_tokens: int) -> Profile:
    flops *= _COMPUTE_EFFICIENCY
    bandwidth *= _BANDWIDTH_EFFICIENCY
    token_s = 2 * _PARAMETERS / flops
    room = 0.9 * 80e9 - _WEIGHT_BYTES - 3e9  # gpu_memory_utilization 0.9, about 3 GB for activations
    return Profile(
        name,
        num_blocks=int(room / _KV_BYTES / 64),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        step_s=1e-3,
        weights_s=_WEIGHT_BYTES / bandwidth,
        prefill_token_s=token_s,
        attention_pair_s=4 * _LAYERS * _WIDTH / flops,
        decode_sequence_s=token_s,
        decode_pair_s=_KV_BYTES / bandwidth,
    )


PROFILES = {
    profile.name: profile
    for profile in (
        _gpu("h100-8b", 989e12, 3.35e12, max_num_seqs=1024, max_num_batched_tokens=8192),
        _gpu("a100-8b", 312e12, 2.039e12, max_num_seqs=256, max_num_batched_tokens=2048),
        Profile(
            "cpu-tiny",
            num_blocks=448,
            max_num_seqs=256,
            max_num_batched_tokens=2048,
            step_s=4e-3,
            weights_s=0.0,
            prefill_token_s=180e-6,
            attention_pair_s=25e-9,
            decode_sequence_s=300e-6,
            decode_pair_s=25e-9,
            max_model_len=2048,
            vocab_size=1024,
        ),
    )
}
