"""fp32 master copies of the fp16 or bf16 weights that train (Micikevicius et al., arXiv 1710.03740)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn


class MasterWeights:
    """What the optimizer steps: the parameters themselves, or fp32 copies of those in less than fp32.

    An update of 2e-4 of a weight is lost in bf16, so such weights are summed up in fp32 and rounded
    to their own type for the next forward pass. Gradients go over to the copies as soon as they are
    complete, so that accumulation too happens in fp32 and no second set stays in memory.

    Args:
        parameters: trainable parameters by name.

    Attributes:
        values: leaf tensors of at least fp32, by the same names, in the same order.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.values: dict[str, torch.Tensor] = {}
        self._low: list[tuple[nn.Parameter, torch.Tensor]] = []
        self._hooks = []
        for name, parameter in parameters.items():
            if parameter.dtype not in (torch.float16, torch.bfloat16):
                self.values[name] = parameter
                continue
            master = parameter.detach().float().requires_grad_(True)
            self.values[name] = master
            self._low.append((parameter, master))
            self._hooks.append(parameter.register_post_accumulate_grad_hook(_gradient_to(master)))

    def round_off(self) -> None:
        """Sets the low-precision parameters to their masters, rounded."""
        with torch.no_grad():
            for parameter, master in self._low:
                parameter.copy_(master)

    def load(self, values: Mapping[str, torch.Tensor]) -> None:
        """Sets masters and parameters to ``values``."""
        with torch.no_grad():
            for name, value in self.values.items():
                value.copy_(values[name])
        self.round_off()

    def copy(self) -> dict[str, torch.Tensor]:
        """The values as they are now."""
        return {name: value.detach().clone() for name, value in self.values.items()}

    def close(self) -> None:
        """Takes the hooks off the parameters."""
        for hook in self._hooks:
            hook.remove()


def _gradient_to(master: torch.Tensor) -> Callable[[torch.Tensor], None]:
    def move(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        if master.grad is None:
            master.grad = parameter.grad.float()
        else:
            master.grad.add_(parameter.grad)
        parameter.grad = None

    return move
