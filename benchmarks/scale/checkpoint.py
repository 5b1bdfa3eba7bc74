"""A Llama-shaped checkpoint of random weights, written one decoder layer at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from benchmarks.random_text import VOCABULARY, random_tokenizer
from scaleot_ray.errors import ConfigError
from scaleot_ray.families.loading import empty_model

_INDEX = "model.safetensors.index.json"
_DEVIATION = 0.02


@dataclass(frozen=True)
class Shape:
    """Of the model; the defaults are Llama-2-7B's."""

    hidden: int = 4096
    intermediate: int = 11008
    layers: int = 32
    heads: int = 32
    vocabulary: int = 32000

    def config(self) -> LlamaConfig:
        """What transformers calls it.

        Raises:
            ConfigError: there is no such model, or its vocabulary is smaller than the tokenizer's.
        """
        if self.hidden % self.heads or self.vocabulary < VOCABULARY or self.layers < 3:
            raise ConfigError(
                f"shape: no Llama has {self}.",
                f"Give a --hidden that --heads divides, a --vocabulary of {VOCABULARY} or more, and three --layers.",
            )
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            max_position_embeddings=4096,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=False,
            dtype=torch.bfloat16,
        )


def write_checkpoint(directory: Path, shape: Shape, say: Callable[[str], None]) -> int:
    """Writes it in bfloat16 unless it is there already; gives the bytes of its weights.

    Layers get their random numbers from their own index, so a checkpoint that was left half-written is finished.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = shape.config()
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in empty_model(config, torch.bfloat16).named_parameters():
        layer = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        shards.setdefault(f"model-{layer}.safetensors", {})[name] = parameter.shape
    for number, (file, shapes) in enumerate(shards.items()):
        if not (directory / file).exists():
            generator = torch.Generator().manual_seed(number)
            tensors = {name: _random(name, own, generator) for name, own in shapes.items()}
            save_file(tensors, directory / f".{file}", metadata={"format": "pt"})
            (directory / f".{file}").rename(directory / file)
            say(f"checkpoint: {number + 1} of {len(shards)} files")
    index = {name: file for file, shapes in shards.items() for name in shapes}
    size = sum((directory / file).stat().st_size for file in shards)
    (directory / _INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": index}))
    config.save_pretrained(directory)
    random_tokenizer().save_pretrained(directory)
    return size


def _random(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if "norm" in name:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=_DEVIATION, generator=generator)
