"""Running a model one decoder layer at a time, so that each can be changed before the next one sees its output."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from scaleot_ray.data.batches import Batch
from scaleot_ray.families import Family


@dataclass
class LayerCalls:
    """How a model calls its decoder layers for one batch.

    Attributes:
        hidden: input of the first layer (batch, time, d).
        real: which positions are no padding (batch, time).
        arguments: for each layer what it is given besides its hidden states: masks, positions, caches.
    """

    hidden: torch.Tensor
    real: torch.Tensor
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]

    def run(self, layer: nn.Module, index: int, hidden: torch.Tensor, family: Family) -> torch.Tensor:
        """Output (batch, time, d) of ``layer`` on other hidden states, as the layer ``index`` would be called."""
        arguments, named = self.arguments[index]
        return family.layer_output(layer(hidden, *arguments, **named))


@torch.no_grad()
def layer_calls(model: nn.Module, family: Family, batch: Batch) -> LayerCalls:
    """What reaches the decoder layers for a batch; costs the embedding and nothing of the layers.

    Args:
        batch: ``input_ids`` and ``attention_mask`` (batch, time).
    """
    device = next(model.parameters()).device
    ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
    with _recording(model, family) as recorders:
        model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)  # type: ignore[operator]
    first = recorders[0].hidden
    assert first is not None
    return LayerCalls(first, mask.bool(), [recorder.arguments for recorder in recorders])


class _Recorder(nn.Module):
    """The identity in a layer's place that keeps what it was called with."""

    def __init__(self, returns_tuple: bool) -> None:
        super().__init__()
        self.returns_tuple = returns_tuple
        self.hidden: torch.Tensor | None = None
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def forward(self, hidden_states: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        self.hidden, self.arguments = hidden_states, (arguments, named)
        return (hidden_states, None) if self.returns_tuple else hidden_states


@contextmanager
def _recording(model: nn.Module, family: Family) -> Iterator[list[_Recorder]]:
    layers = family.layers(model)
    raw = list(layers)
    recorders = [_Recorder(family.returns_tuple) for _ in raw]
    try:
        for index, recorder in enumerate(recorders):
            layers[index] = recorder
        yield recorders
    finally:
        for index, layer in enumerate(raw):
            layers[index] = layer
