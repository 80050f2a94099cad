"""What vLLM's own worker processes do to get new weights; vLLM mixes this class into its worker."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from kvrouter.ray.collective import WeightGroup


class WeightsExtension:
    """Methods for ``collective_rpc``; each is called on every rank of the engine."""

    model_runner: Any
    rank: int
    device: Any
    kvrouter_group: WeightGroup

    def kvrouter_load_weights(self, path: str) -> None:
        """Loads a checkpoint: a ``.safetensors`` file or a folder of them, with the names of the model's own."""
        self._kvrouter_reload(_tensors(Path(path)))

    def kvrouter_init_collective(self, host: str, port: int, first_rank: int, world_size: int) -> None:
        """Joins the group of the broadcast as rank ``first_rank`` + its own."""
        self.kvrouter_group = WeightGroup(host, port, first_rank + self.rank, world_size, self.device.type)

    def kvrouter_receive_weights(self, info: Sequence[tuple[str, Sequence[int], str]]) -> None:
        """Receives tensors of these names, shapes and types, one broadcast each, and loads them."""
        group = self.kvrouter_group

        def received() -> Iterator[tuple[str, torch.Tensor]]:
            for name, shape, dtype in info:
                yield name, group.receive(shape, dtype, self.device)

        self._kvrouter_reload(received())

    def _kvrouter_reload(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        config = self.model_runner.model_config.hf_text_config
        if getattr(config, "tie_word_embeddings", False):
            weights = _with_tied_head(weights)
        self.model_runner.reload_weights(weights_iterator=weights)


def _tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import safe_open

    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"there are no *.safetensors in {path}")
    for file in files:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dictionary)
                yield name, tensors.get_tensor(name)


def _with_tied_head(weights: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The output head, which shares the embedding's weight and may be left out, right after the embedding.

    vLLM ties the two when it builds the model, not when it reloads weights: the head would keep its old ones.
    """
    for name, tensor in weights:
        if name == "lm_head.weight":
            continue
        yield name, tensor
        if name.endswith("embed_tokens.weight"):
            yield "lm_head.weight", tensor
