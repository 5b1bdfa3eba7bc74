"""``layers``: every parameter of the plug-in layers trains (offsite tuning's own choice)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn

from scaleot_ray.config import TuneSettings
from scaleot_ray.families import Family
from scaleot_ray.tuning.delta import MethodSettings
from scaleot_ray.tuning.method import PlugInMethod, delta_dtype


class WholeLayers(PlugInMethod):
    """Trains the plug-in layers themselves; the delta is tuned − received, parameter by parameter."""

    name: ClassVar[str] = "layers"
    learning_rate: ClassVar[float] = 2e-4

    def __init__(self) -> None:
        super().__init__()
        self._received: dict[str, torch.Tensor] = {}

    @staticmethod
    def settings(tune: TuneSettings, family: Family) -> MethodSettings:
        return {}

    @staticmethod
    def shapes(
        model: nn.Module, family: Family, positions: tuple[int, ...], settings: MethodSettings
    ) -> dict[str, torch.Size]:
        return {name: value.shape for name, value in layer_parameters(model, family, positions).items()}

    def _attach(
        self, model: nn.Module, family: Family, positions: tuple[int, ...], settings: MethodSettings
    ) -> dict[str, nn.Parameter]:
        parameters = layer_parameters(model, family, positions)
        for name, parameter in parameters.items():
            # The received tensor may be a view of an object that others read: train a copy, keep it as it is.
            self._received[name] = parameter.data
            parameter.data = parameter.data.clone()
            parameter.requires_grad_(True)
        return parameters

    def _load(self, tensors: Mapping[str, torch.Tensor], scale: float) -> None:
        for name, parameter in self.parameters.items():
            parameter.data = changed(self._received[name], tensors[name], scale)

    def changes(self, values: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        values = self.parameters if values is None else values
        result = {}
        for name, received in self._received.items():
            dtype = delta_dtype(received.dtype)
            result[name] = values[name].detach().to(dtype) - received.to(dtype)
        return result

    def _detach(self, model: nn.Module) -> None:
        for name, received in self._received.items():
            parameter = model.get_parameter(name)
            parameter.data = received.to(parameter.device)
        self._received = {}


def layer_parameters(model: nn.Module, family: Family, positions: tuple[int, ...]) -> dict[str, nn.Parameter]:
    """Parameters of the decoder layers at ``positions``, by their full name in the model."""
    layers = family.layers(model)
    return {
        family.layer_prefix(position) + name: parameter
        for position in positions
        for name, parameter in layers[position].named_parameters()
    }


def changed(received: torch.Tensor, change: torch.Tensor, scale: float) -> torch.Tensor:
    """A new tensor ``received + scale · change`` of the received type; where the change is zero, the same bits.

    A plain sum would turn −0.0 into 0.0.
    """
    change = change.to(received.device, delta_dtype(received.dtype))
    total = (received.to(change.dtype) + scale * change).to(received.dtype)
    return torch.where(change == 0, received, total)
