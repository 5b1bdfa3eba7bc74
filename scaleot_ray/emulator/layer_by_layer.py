"""Running a model one decoder layer at a time, so that each can be changed before the next one sees its output."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from scaleot_ray.data.batches import Batch
from scaleot_ray.families import Family

_Module = TypeVar("_Module", bound=nn.Module)


@dataclass
class LayerCalls:
    """How a model calls its decoder layers for one batch.

    Attributes:
        hidden: input of the first layer (batch, time, d), until :meth:`begin` is called.
        real: which positions are no padding (batch, time).
        arguments: for each layer what it is given besides its hidden states: masks, positions, caches.
    """

    hidden: torch.Tensor
    real: torch.Tensor
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]

    def begin(self) -> torch.Tensor:
        """The input of the first layer, which is not kept here any more: it is as large as a residual stream."""
        hidden, self.hidden = self.hidden, self.hidden.new_empty(0)
        return hidden

    def run(self, layer: nn.Module, index: int, hidden: torch.Tensor, family: Family) -> torch.Tensor:
        """Output (batch, time, d) of ``layer`` on other hidden states, as the layer ``index`` would be called."""
        arguments, named = self.arguments[index]
        return family.layer_output(layer(hidden, *arguments, **named))


@torch.no_grad()
def layer_calls(model: nn.Module, family: Family, batch: Batch, device: torch.device | None = None) -> LayerCalls:
    """What reaches the decoder layers for a batch; costs the embedding and nothing of the layers.

    Args:
        batch: ``input_ids`` and ``attention_mask`` (batch, time).
        device: of the layers; None for the model's own.
    """
    device = device or next(model.parameters()).device
    ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
    with _in_place_of_layers(model, family, lambda: _Recorder(family.returns_tuple)) as recorders:
        model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)  # type: ignore[operator]
    first = recorders[0].hidden
    assert first is not None
    return LayerCalls(first, mask.bool(), [recorder.arguments for recorder in recorders])


@contextmanager
def layers_gave(model: nn.Module, family: Family, hidden: torch.Tensor) -> Iterator[None]:
    """Within, the model's layers compute nothing: what comes out of the last one is ``hidden`` (batch, time, d)."""
    with _in_place_of_layers(model, family, lambda: _Given(hidden, family.returns_tuple)):
        yield


class _Given(nn.Module):
    """In a layer's place, gives what was computed elsewhere."""

    def __init__(self, hidden: torch.Tensor, returns_tuple: bool) -> None:
        super().__init__()
        self.hidden, self.returns_tuple = hidden, returns_tuple

    def forward(self, *_: Any, **__: Any) -> Any:
        return (self.hidden, None) if self.returns_tuple else self.hidden


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
def _in_place_of_layers(model: nn.Module, family: Family, make: Callable[[], _Module]) -> Iterator[list[_Module]]:
    layers = family.layers(model)
    raw = list(layers)
    others = [make() for _ in raw]
    try:
        for index, other in enumerate(others):
            layers[index] = other
        yield others
    finally:
        for index, layer in enumerate(raw):
            layers[index] = layer
