"""AdamW over harmonizers of which only those in use are updated."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from scaleot_ray.emulator.harmonizer import Harmonizer

STEP = "step"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's names of its two moments."""


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
        gradient_scale: what losses are multiplied with before their backward pass; gradients are divided by it.

    Attributes:
        replaced: layers that the next step updates.
        updates: of each layer's harmonizer so far.
        gradient_scale: as given.
    """

    def __init__(
        self,
        harmonizers: Mapping[int, Harmonizer],
        learning_rate: float,
        weight_decay: float,
        gradient_scale: float = 1.0,
    ) -> None:
        groups = [{"params": list(module.parameters()), "layer": index} for index, module in harmonizers.items()]
        super().__init__(groups, lr=learning_rate, betas=(0.9, 0.95), weight_decay=weight_decay)
        self.replaced: Collection[int] = ()
        self.updates = dict.fromkeys(harmonizers, 0)
        self.gradient_scale = gradient_scale

    def prepare(self, replaced: Collection[int], learning_rate: float) -> None:
        """Says which layers' harmonizers the next step updates, and how fast."""
        self.replaced = replaced
        for layer in replaced:
            self.updates[layer] += 1
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
        aside: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        for group in self.param_groups:
            for parameter in group["params"]:
                self._begin(parameter)
                if group["layer"] not in self.replaced:
                    aside.append((parameter, parameter.grad))
                    parameter.grad = None
                elif parameter.grad is not None:
                    parameter.grad.div_(self.gradient_scale)
                # Counted here, since a parameter may be in several pieces, in this process and in others.
                self.state[parameter][STEP].fill_(self.updates[group["layer"]] - (group["layer"] in self.replaced))
        found = super().step(closure)
        # Whoever offloads gradients has one place for each and goes on to use it.
        for parameter, gradient in aside:
            parameter.grad = gradient
        return found

    def _begin(self, parameter: torch.Tensor) -> None:
        state = self.state[parameter]
        if not state:
            state[STEP] = torch.zeros((), dtype=torch.float32)
            state.update({name: torch.zeros_like(parameter) for name in MOMENTS})
