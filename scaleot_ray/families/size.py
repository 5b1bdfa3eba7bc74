"""How large a model is, before any of its weights is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from scaleot_ray.config import ModelSettings
from scaleot_ray.families import family_of
from scaleot_ray.families.family import context_length, hidden_size, layer_count
from scaleot_ray.families.gguf import Value, gguf_metadata
from scaleot_ray.families.loading import directory_config, empty_model, gguf_config
from scaleot_ray.families.mapped import stored_dtype
from scaleot_ray.families.sources import resolve_source


@dataclass(frozen=True)
class ModelSize:
    """Counts that memory and disk follow from.

    Attributes:
        parameters: of the whole model, at most (a GGUF file does not say whether its head is tied).
        layer_parameters: of one decoder layer.
        layers: decoder layers n.
        width: d of the residual stream.
        vocabulary: token ids.
        context: tokens of the longest sequence; None where nothing says.
    """

    parameters: int
    layer_parameters: int
    layers: int
    width: int
    vocabulary: int
    context: int | None = None


def model_config(settings: ModelSettings) -> tuple[Any, str | None]:
    """A base model's config, and the type of the weights in its files; None of a GGUF file, which is unpacked.

    The weights need not be there yet: the config names their type too.

    Raises:
        ConfigError: ``model.path`` leads to no model.
        UnsupportedArchitectureError: no family knows the architecture.
    """
    source = resolve_source(settings.path, "model.path", ("config.json", "*.safetensors"))
    if source.is_file():
        config = gguf_config(source, str(gguf_metadata(source).get("general.architecture")))
        family_of(config)
        return config, None
    config = directory_config(source)
    named = str(config.dtype).removeprefix("torch.") if config.dtype is not None else None
    return config, stored_dtype(source) or named


def model_size(settings: ModelSettings) -> ModelSize:
    """The size of a base model, from its config or its GGUF header.

    Raises:
        ConfigError: ``model.path`` leads to no model.
        UnsupportedArchitectureError: no family knows the architecture.
    """
    source = resolve_source(settings.path, "model.path", ("config.json", "*.safetensors"))
    if source.is_file():
        return _from_header(gguf_metadata(source))
    return _from_config(directory_config(source))


def _from_config(config: Any) -> ModelSize:
    family = family_of(config)
    model: Any = empty_model(config, torch.float32)
    model.tie_weights()
    rows = model.get_input_embeddings().weight.shape[0]
    return ModelSize(
        sum(parameter.numel() for parameter in model.parameters()),
        sum(parameter.numel() for parameter in family.layers(model)[0].parameters()),
        layer_count(config),
        hidden_size(config),
        rows,
        context_length(config),
    )


def _from_header(metadata: dict[str, Value]) -> ModelSize:
    def number(key: str, default: int = 0) -> int:
        value = metadata.get(f"{metadata.get('general.architecture')}.{key}", default)
        return int(value) if isinstance(value, int | float) else default

    width, heads = number("embedding_length"), max(number("attention.head_count", 1), 1)
    keys = width * number("attention.head_count_kv", heads) // heads
    # Gate, up and down; query and output; key and value; norms and biases are a rounding error beside them.
    layer = 3 * width * number("feed_forward_length", 4 * width) + 2 * width * width + 2 * width * keys
    # Many converters leave the vocabulary's size out; its tokens are there in any case.
    vocabulary = number("vocab_size") or int(metadata.get("tokenizer.ggml.tokens.length", 0))
    layers = number("block_count")
    parameters = layers * layer + 2 * vocabulary * width
    return ModelSize(parameters, layer, layers, width, vocabulary, number("context_length") or None)
