"""The interface of a plug-in method: which parameters train, and what they mean as a delta."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn

from scaleot_ray.config import TuneSettings
from scaleot_ray.errors import ConfigError
from scaleot_ray.families import Family
from scaleot_ray.tuning.delta import MethodSettings, check_tensors

# Models that carry a method's parameters now. A second one on top would take the first one's
# parameters for the model's own, and could not be taken off in the right order.
_ATTACHED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class PlugInMethod(ABC):
    """One way to tune the plug-in layers, attached to one model at a time.

    It works on an emulator and on the full model alike, since both have the plug-in layers raw and at
    the same depth. :meth:`attach` makes the model trainable, :meth:`changes` reads off the delta,
    :meth:`detach` leaves the model bit for bit as it was before.

    Attributes:
        name: value of ``tune.method``.
        learning_rate: peak learning rate where the settings give none.
        parameters: the trainable parameters by the name of their delta tensor; empty while detached.
    """

    name: ClassVar[str]
    learning_rate: ClassVar[float]

    def __init__(self) -> None:
        self.parameters: dict[str, nn.Parameter] = {}
        self._model: nn.Module | None = None
        self._required_grad: list[tuple[nn.Parameter, bool]] = []

    @staticmethod
    @abstractmethod
    def settings(tune: TuneSettings, family: Family) -> MethodSettings:
        """What a delta of this method carries so that it can be rebuilt elsewhere."""

    @staticmethod
    @abstractmethod
    def shapes(
        model: nn.Module, family: Family, positions: tuple[int, ...], settings: MethodSettings
    ) -> dict[str, torch.Size]:
        """Names and shapes of the delta's tensors on ``model``."""

    def attach(
        self, model: nn.Module, family: Family, positions: tuple[int, ...], settings: MethodSettings
    ) -> dict[str, nn.Parameter]:
        """Freezes the model except for this method's parameters, which it returns by delta name.

        Untouched, they leave the model's output as it is. Everything that was is kept for :meth:`detach`.

        Raises:
            ConfigError: the model carries a plug-in already, or has no layer at one of ``positions``.
        """
        count = len(family.layers(model))
        if not positions or sorted(set(positions)) != list(positions) or positions[0] < 0 or positions[-1] >= count:
            raise ConfigError(
                f"Plug-in layers {list(positions)}: expected ascending depths between 0 and {count - 1}.",
                "Take the positions from the emulator's manifest.",
            )
        claim(model)
        self._model = model
        self._required_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        try:
            model.requires_grad_(False)
            self.parameters = self._attach(model, family, positions, settings)
        except BaseException:
            self.detach()
            raise
        return self.parameters

    def load(self, tensors: Mapping[str, torch.Tensor], scale: float = 1.0) -> None:
        """Sets the attached parameters to what a delta says, its effect times ``scale``.

        Raises:
            ArtifactRefused: the names or shapes are not those of the attached parameters.
        """
        check_tensors(tensors, {name: value.shape for name, value in self.parameters.items()}, self.name)
        with torch.no_grad():
            self._load(tensors, scale)

    @abstractmethod
    def changes(self, values: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """The delta's tensors, copies in fp32 (fp64 for an fp64 model).

        Args:
            values: trained values by name where they are finer than the parameters (fp32 masters of
                fp16 or bf16 weights); default: the parameters themselves.
        """

    def detach(self) -> None:
        """Takes the method off; the model is then bit for bit as before :meth:`attach`."""
        if self._model is None:
            return
        self._detach(self._model)
        for parameter in self.parameters.values():
            parameter.grad = None
        for parameter, required in self._required_grad:
            parameter.requires_grad_(required)
        release(self._model)
        self.parameters, self._required_grad, self._model = {}, [], None

    @abstractmethod
    def _attach(
        self, model: nn.Module, family: Family, positions: tuple[int, ...], settings: MethodSettings
    ) -> dict[str, nn.Parameter]: ...

    @abstractmethod
    def _load(self, tensors: Mapping[str, torch.Tensor], scale: float) -> None: ...

    @abstractmethod
    def _detach(self, model: nn.Module) -> None: ...


def claim(model: nn.Module) -> None:
    """Marks ``model`` as one that carries trainable parameters of ours, until :func:`release`.

    Raises:
        ConfigError: it carries some already.
    """
    if model in _ATTACHED:
        raise ConfigError(
            "The model carries a plug-in already.", "Take it off first: unplug() or detach() what is on the model."
        )
    _ATTACHED.add(model)


def release(model: nn.Module) -> None:
    """Undoes :func:`claim`."""
    _ATTACHED.discard(model)


def is_attached(model: nn.Module) -> bool:
    """Whether a method's parameters are on ``model``: it is being tuned, or has a delta plugged in."""
    return model in _ATTACHED


def delta_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of a delta's tensors for weights of ``dtype``: at least fp32."""
    return torch.promote_types(dtype, torch.float32)
