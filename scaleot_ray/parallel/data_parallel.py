"""Harmonizers trained by processes that each hold everything: gradients are averaged, nothing is spread (ZeRO 0).

DeepSpeed could do that too. It would send zeros for every harmonizer that is masked out, and knows no float64.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import distributed, nn

from scaleot_ray.emulator.harmonizer import Harmonizer
from scaleot_ray.emulator.layer_replace_steps import MakeTraining, OneProcess
from scaleot_ray.emulator.masked_adam import MaskedAdamW
from scaleot_ray.ranks import Ranks


def averaging(ranks: Ranks, device: torch.device) -> MakeTraining:
    """Training on ``device`` in each process of a group that this process has joined."""

    def make(model: nn.Module, harmonizers: Mapping[int, Harmonizer], adam: MaskedAdamW) -> Averaging:
        model.to(device)
        return Averaging(model, harmonizers, adam, ranks.size)

    return make


class Averaging(OneProcess):
    """One process's training with the mean of all processes' gradients."""

    def __init__(
        self, model: nn.Module, harmonizers: Mapping[int, Harmonizer], adam: MaskedAdamW, processes: int
    ) -> None:
        super().__init__(model, harmonizers, adam)
        self._processes = processes

    def average(self, gradients: list[torch.Tensor]) -> None:
        """Of the harmonizers in use, all in one exchange."""
        together = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(together)
        parts = (together / self._processes).split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
