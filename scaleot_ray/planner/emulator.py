"""The shape of an emulator before it is built."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from scaleot_ray.config import EmulatorSettings, StageOneSettings
from scaleot_ray.emulator.assemble import unfilled_emulator
from scaleot_ray.emulator.build import FullModelFacts, check_triplet, choose_layers, describe_build, verbatim_tensors
from scaleot_ray.emulator.layer_map import LayerRole, positions
from scaleot_ray.emulator.layer_replace import candidate_layers
from scaleot_ray.emulator.privacy import LADDER
from scaleot_ray.emulator.stage_one import StageOne
from scaleot_ray.emulator.streaming.build import blank_attention
from scaleot_ray.families import family_of, hidden_size, layer_count
from scaleot_ray.families.loading import BaseModel, empty_model


@dataclass(frozen=True)
class EmulatorShape:
    """A full model and its emulator, as architectures.

    Args:
        config: of the full model.
        dtype: of its weights.
        stage_one: settings of stage 1.
        settings: of the emulator. Which layers will be replaced is not known yet; how many there are is.

    Raises:
        ConfigError: no such emulator can be built.
    """

    config: Any
    dtype: torch.dtype
    stage_one: StageOneSettings
    settings: EmulatorSettings

    @cached_property
    def triplet(self) -> EmulatorSettings:
        """The settings, with the largest emulator's α and β where a privacy level leaves them to be found."""
        if self.settings.privacy is None:
            return self.settings
        alpha, beta = LADDER[0]
        return self.settings.model_copy(update={"privacy": None, "alpha": alpha, "beta": beta})

    @property
    def beta(self) -> float:
        """Rank reduction of the kept layers' attention."""
        return self.triplet.beta

    @cached_property
    def roles(self) -> list[LayerRole]:
        """A role for every layer."""
        layers = layer_count(self.config)
        check_triplet(layers, self.triplet)
        return choose_layers(layers, self._stage_one(candidate_layers(layers)), self.triplet)

    @cached_property
    def base(self) -> BaseModel:
        """The full model on the meta device; its tokenizer is not there."""
        return BaseModel(full_model(self.config, self.dtype), None, family_of(self.config), "", "")

    def model(self) -> Any:
        """The emulator on the meta device, frozen."""
        content = describe_build(self.base, self._stage_one(()), self.roles, self.triplet, FullModelFacts("0" * 64))
        tensors = verbatim_tensors(self.base, self.roles, self.beta)
        model = unfilled_emulator(
            self.config, content, tensors | blank_attention(self.base, self.roles, self.beta), self.dtype
        )
        model.tie_weights()
        return model.requires_grad_(False).eval()

    @cached_property
    def bytes(self) -> int:
        """The emulator's weights."""
        return self.dtype.itemsize * parameters(self.model())

    @cached_property
    def own_bytes(self) -> int:
        """Of these, what is not the full model's."""
        return self.bytes - sum(
            tensor.numel() * self.dtype.itemsize
            for tensor in verbatim_tensors(self.base, self.roles, self.beta).values()
        )

    @property
    def harmonizer_parameters(self) -> int:
        """Of one harmonizer."""
        width, rank = hidden_size(self.config), self.stage_one.harmonizer_rank
        return 2 * width * rank + width + rank

    def replaced(self) -> int:
        """How many layers a harmonizer stands in for."""
        return len(positions(self.roles, LayerRole.REPLACED))

    def _stage_one(self, scored: tuple[int, ...]) -> StageOne:
        return StageOne(self.stage_one, {index: float(index) for index in scored}, {})


def full_model(config: Any, dtype: torch.dtype) -> Any:
    """The full model on the meta device."""
    model = empty_model(config, dtype)
    model.tie_weights()
    return model


def parameters(module: nn.Module) -> int:
    """Numbers that a module has, tied ones once."""
    return sum(parameter.numel() for parameter in module.parameters())
