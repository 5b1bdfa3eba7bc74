"""AdamW over harmonizers of which only those in use are updated."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from scaleot_ray.emulator.harmonizer import Harmonizer

_MOMENTS = ("exp_avg", "exp_avg_sq")


class MaskedAdamW(torch.optim.AdamW):
    """AdamW that leaves a harmonizer as it is in steps whose mask does not contain its layer.

    Weights, moments and step count of a masked-out harmonizer stay, weight decay included. A gradient of None would say
    the same, but whoever averages gradients over processes fills it up with zeros, on which momentum would run on: so
    the mask is told to the optimizer, and one process and many do the same. Each harmonizer is a parameter group of its
    own; whoever flattens parameters (ZeRO) does so group by group, and the mask still holds.

    Args:
        harmonizers: by layer.
        learning_rate: of the first step.
        weight_decay: as in AdamW.
    """

    def __init__(self, harmonizers: Mapping[int, Harmonizer], learning_rate: float, weight_decay: float) -> None:
        groups = [{"params": list(module.parameters()), "layer": index} for index, module in harmonizers.items()]
        super().__init__(groups, lr=learning_rate, betas=(0.9, 0.95), weight_decay=weight_decay)
        self._replaced: Collection[int] = ()

    def prepare(self, replaced: Collection[int], learning_rate: float) -> None:
        """Says which layers' harmonizers the next step updates, and how fast."""
        self._replaced = replaced
        for group in self.param_groups:
            group["lr"] = learning_rate

    def begin_moments(self) -> None:
        """Moments of zero for every parameter that has none: what AdamW itself does in its first update."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self._begin(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates what :meth:`prepare` named."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self._begin(parameter)
                if group["layer"] not in self._replaced:
                    parameter.grad = None
        return super().step(closure)

    def _begin(self, parameter: torch.Tensor) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state.update({name: torch.zeros_like(parameter) for name in _MOMENTS})
