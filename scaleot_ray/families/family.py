"""What the rest of the package needs to know about a model architecture.

A :class:`Family` says where the decoder layers live, which of their submodules are attention and MLP
projections, and how fused attention projections split into query, key and value. Everything else
(embeddings, head, norms, position encodings) is the model's own business and is never touched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

Rows = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Projection:
    """A linear map inside a decoder layer.

    Attributes:
        path: module path relative to the layer, e.g. ``self_attn.q_proj``.
        parts: for fused projections, a function from the model's config to the output rows of each
            part (query, key, value), as index tensors; None where the module is one matrix.
    """

    path: str
    parts: Callable[[Any], Rows] | None = None


@dataclass(frozen=True)
class Family:
    """One architecture family.

    Attributes:
        name: short name, as manifests carry it.
        model_types: the ``config.model_type`` values that belong to it.
        layers_path: module path of the ``ModuleList`` of decoder layers in the causal-LM model.
        attention: query, key, value and output projections (what rank compression works on).
        mlp: the MLP's projections.
        returns_tuple: whether a decoder layer returns ``(hidden_states, …)`` instead of a tensor.
        transposed: whether its projections are Conv1D, which store their weight as (in, out).
        normed_attention: the ``config.model_type`` values whose attention output passes a norm before it joins
            the residual stream.
    """

    name: str
    model_types: tuple[str, ...]
    layers_path: str
    attention: tuple[Projection, ...]
    mlp: tuple[Projection, ...]
    returns_tuple: bool = False
    transposed: bool = False
    normed_attention: tuple[str, ...] = ()

    def adds_attention_output(self, config: Any) -> bool:
        """Whether what the output projection makes is added to the residual stream as it is."""
        return config.model_type not in self.normed_attention

    def layers(self, model: nn.Module) -> nn.ModuleList:
        """The decoder layers of ``model``, in order; replacing an entry replaces the layer."""
        layers = model.get_submodule(self.layers_path)
        assert isinstance(layers, nn.ModuleList)
        return layers

    def layer_prefix(self, index: int) -> str:
        """Start of every parameter name of decoder layer ``index``, e.g. ``model.layers.3.``."""
        return f"{self.layers_path}.{index}."

    def layer_output(self, output: Any) -> torch.Tensor:
        """Hidden states (batch, time, d) out of what a decoder layer returned."""
        return output[0] if self.returns_tuple else output


def text_config(config: Any) -> Any:
    """The language model's part of a config (the config itself unless it is multimodal)."""
    return config.get_text_config()


def layer_count(config: Any) -> int:
    """Number of decoder layers n."""
    return int(text_config(config).num_hidden_layers)


def hidden_size(config: Any) -> int:
    """Width d of the residual stream between decoder layers."""
    return int(text_config(config).hidden_size)


def context_length(config: Any) -> int | None:
    """Tokens of the longest sequence the model takes; None where its config sets no bound."""
    context = getattr(text_config(config), "max_position_embeddings", None)
    return None if context is None else int(context)


def dense_weight(projection: nn.Module) -> torch.Tensor:
    """Weight of a projection as (out, in), whichever way the module stores it (a view, not a copy)."""
    weight = projection.weight
    assert isinstance(weight, torch.Tensor)
    return weight.t() if isinstance(projection, Conv1D) else weight


def as_stored(projection: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`dense_weight`: an (out, in) matrix as the projection stores it, contiguous."""
    return (weight.t() if isinstance(projection, Conv1D) else weight).contiguous()


def head_size(config: Any) -> int:
    """Width of one attention head."""
    explicit = getattr(config, "head_dim", None)
    return int(explicit) if explicit else hidden_size(config) // int(config.num_attention_heads)


def stacked_rows(sizes: Callable[[Any], tuple[int, ...]]) -> Callable[[Any], Rows]:
    """Parts of a projection whose output is query, key and value one after the other."""

    def rows(config: Any) -> Rows:
        parts, start = [], 0
        for size in sizes(config):
            parts.append(torch.arange(start, start + size))
            start += size
        return tuple(parts)

    return rows


def rows_by_head(config: Any) -> Rows:
    """Parts of a projection whose output is laid out head by head: (heads, 3, head size)."""
    heads, size = int(config.num_attention_heads), head_size(config)
    index = torch.arange(heads * 3 * size).view(heads, 3, size)
    return tuple(index[:, part].reshape(-1) for part in range(3))
