"""``bottleneck``: a residual bottleneck after each plug-in layer (Houlsby et al., arXiv 1902.00751)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from scaleot_ray.config import TuneSettings
from scaleot_ray.errors import ArtifactRefused
from scaleot_ray.families import Family, hidden_size
from scaleot_ray.tuning.delta import MethodSettings
from scaleot_ray.tuning.method import PlugInMethod, delta_dtype

ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "silu": nn.SiLU, "relu": nn.ReLU}
MODULE = "bottleneck"


class Bottleneck(nn.Module):
    """h + up(act(down(h))) on hidden states h (batch, time, d); ``up`` starts at zero, so it starts as h."""

    def __init__(self, size: int, width: int, activation: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.down = nn.Linear(size, width, dtype=dtype)
        self.act = ACTIVATIONS[activation]()
        self.up = nn.Linear(width, size, dtype=dtype)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.up(self.act(self.down(hidden.to(self.down.weight.dtype)))).to(hidden.dtype)


class ResidualBottleneck(PlugInMethod):
    """Trains one :class:`Bottleneck` after each plug-in layer; the layers themselves stay as received."""

    name: ClassVar[str] = "bottleneck"
    learning_rate: ClassVar[float] = 1e-3

    def __init__(self) -> None:
        super().__init__()
        self._layers: list[nn.Module] = []
        self._hooks: list[RemovableHandle] = []

    @staticmethod
    def settings(tune: TuneSettings, family: Family) -> MethodSettings:
        return {"width": tune.bottleneck_width, "activation": "gelu"}

    @staticmethod
    def shapes(
        model: nn.Module, family: Family, positions: tuple[int, ...], settings: MethodSettings
    ) -> dict[str, torch.Size]:
        size, (width, _) = hidden_size(model.config), _width_and_activation(settings)
        parts = {"down.weight": (width, size), "down.bias": (width,), "up.weight": (size, width), "up.bias": (size,)}
        return {
            f"{family.layer_prefix(position)}{MODULE}.{part}": torch.Size(shape)
            for position in positions
            for part, shape in parts.items()
        }

    def _attach(
        self, model: nn.Module, family: Family, positions: tuple[int, ...], settings: MethodSettings
    ) -> dict[str, nn.Parameter]:
        width, activation = _width_and_activation(settings)

        def after_layer(layer: nn.Module, inputs: Any, output: Any) -> Any:
            changed = layer.get_submodule(MODULE)(family.layer_output(output))
            return (changed, *output[1:]) if family.returns_tuple else changed

        parameters = {}
        for position in positions:
            layer = family.layers(model)[position]
            like = next(layer.parameters())
            # Made on the CPU, so that a seed means the same start on every device.
            added = Bottleneck(hidden_size(model.config), width, activation, delta_dtype(like.dtype)).to(like.device)
            layer.add_module(MODULE, added)  # a submodule, so that it moves and is counted with the layer
            self._layers.append(layer)
            self._hooks.append(layer.register_forward_hook(after_layer))
            for name, parameter in added.named_parameters():
                parameters[f"{family.layer_prefix(position)}{MODULE}.{name}"] = parameter
        return parameters

    def _load(self, tensors: Mapping[str, torch.Tensor], scale: float) -> None:
        for name, parameter in self.parameters.items():
            factor = scale if f".{MODULE}.up." in name else 1.0
            parameter.copy_(tensors[name].to(parameter.device, parameter.dtype) * factor)

    def changes(self, values: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        values = self.parameters if values is None else values
        return {name: value.detach().clone() for name, value in values.items()}

    def _detach(self, model: nn.Module) -> None:
        for hook in self._hooks:
            hook.remove()
        for layer in self._layers:
            delattr(layer, MODULE)
        self._layers, self._hooks = [], []


def _width_and_activation(settings: MethodSettings) -> tuple[int, str]:
    width, activation = settings.get("width"), settings.get("activation")
    if not isinstance(width, int) or width < 1 or not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ArtifactRefused(
            f"Delta (bottleneck): width {width!r} and activation {activation!r}; expected a whole number above zero "
            f"and one of {', '.join(ACTIVATIONS)}.",
            "Take the delta as `scaleot tune` wrote it.",
        )
    return width, activation
