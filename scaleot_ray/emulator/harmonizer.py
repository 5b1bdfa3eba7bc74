"""Harmonizers: small modules that stand in for a decoder layer at its own depth (ScaleOT §3.1)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from scaleot_ray.families import Family

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "identity": nn.Identity,
}


class Harmonizer(nn.Module):
    """h(x) = x + W_up · act(W_down x + b_d) + b_u, called like the decoder layer it replaces.

    W_down starts random and W_up at zero, so that the harmonizer is the identity at first and yet
    gets a gradient: with both at zero only b_u would ever learn.

    Args:
        hidden_size: width d of the residual stream.
        rank: hidden units r.
        activation: ``silu``, ``gelu`` or ``relu``; ``identity`` makes it a linear map of rank r.
        returns_tuple: return ``(hidden_states, None)``, as the family's layers do.
    """

    def __init__(self, hidden_size: int, rank: int, activation: str = "silu", returns_tuple: bool = False) -> None:
        super().__init__()
        self.down = nn.Linear(hidden_size, rank)
        self.up = nn.Linear(rank, hidden_size)
        self.act = ACTIVATIONS[activation]()
        self.returns_tuple = returns_tuple
        nn.init.normal_(self.down.weight, std=hidden_size**-0.5)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    @property
    def linear(self) -> bool:
        """Whether it is a linear map."""
        return isinstance(self.act, nn.Identity)

    def inner(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Hidden units act(W_down x + b_d) (…, r)."""
        # In stage 1 harmonizers learn in float32, whatever the type of the model around them.
        return self.act(self.down(hidden_states.to(self.down.weight.dtype)))

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        """Hidden states (batch, time, d) to the same shape; what else a decoder layer takes is ignored."""
        output = hidden_states + self.up(self.inner(hidden_states)).to(hidden_states.dtype)
        return (output, None) if self.returns_tuple else output


class DroppedLayer(nn.Module):
    """The identity in a decoder layer's place (uniform LayerDrop), so that all others keep their depth."""

    def __init__(self, returns_tuple: bool = False) -> None:
        super().__init__()
        self.returns_tuple = returns_tuple

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        """Hidden states as they came."""
        return (hidden_states, None) if self.returns_tuple else hidden_states


class SwitchableLayer(nn.Module):
    """A raw layer and its harmonizer in one place, with a switch; stage 1 flips it at every step.

    Args:
        raw: the layer.
        harmonizer: what stands in for it.
        recompute: the raw layer's activations are computed again in the backward pass instead of kept (Chen et al.,
            arXiv 1604.06174). transformers' own switch for that works in training mode alone, with dropout.
    """

    def __init__(self, raw: nn.Module, harmonizer: Harmonizer, recompute: bool = False) -> None:
        super().__init__()
        self.raw = raw
        self.harmonizer = harmonizer
        self.recompute = recompute
        self.replaced = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The harmonizer's output when switched to it, else the raw layer's."""
        if self.replaced:
            return self.harmonizer(*args, **kwargs)
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.raw, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        return self.raw(*args, **kwargs)


class Switchboard:
    """The switchable layers of a model; at most one mask is set at a time."""

    def __init__(self, layers: dict[int, SwitchableLayer]) -> None:
        self.layers = layers

    def set(self, replaced: set[int] | frozenset[int]) -> None:
        """Switches exactly the layers ``replaced`` to their harmonizers."""
        for index, layer in self.layers.items():
            layer.replaced = index in replaced


@contextmanager
def switchable(
    model: nn.Module, family: Family, harmonizers: dict[int, Harmonizer], recompute: bool = False
) -> Iterator[Switchboard]:
    """Makes the layers that have a harmonizer switchable; puts the raw layers back at the end."""
    layers = family.layers(model)
    switches = {
        index: SwitchableLayer(layers[index], harmonizer, recompute) for index, harmonizer in harmonizers.items()
    }
    try:
        for index, switch in switches.items():
            layers[index] = switch
        yield Switchboard(switches)
    finally:
        for index, switch in switches.items():
            layers[index] = switch.raw
