"""A delta into the full model, and out again."""

from __future__ import annotations

import math
from types import TracebackType
from typing import Any

import torch

from scaleot_ray.errors import ArtifactRefused, ConfigError
from scaleot_ray.families import Family
from scaleot_ray.tuning.delta import Delta, check_tensors
from scaleot_ray.tuning.method import PlugInMethod
from scaleot_ray.tuning.methods import METHODS


class Plugged:
    """A delta that is in a model until :meth:`unplug`, or to the end of a ``with`` block."""

    def __init__(self, method: PlugInMethod | None) -> None:
        self._method = method

    def unplug(self) -> None:
        """Restores every bit of the model as it was before; further calls do nothing."""
        if self._method is not None:
            self._method.detach()
        self._method = None

    def __enter__(self) -> Plugged:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.unplug()


def plug(model: Any, family: Family, delta: Delta, scale: float = 1.0) -> Plugged:
    """Applies ``delta`` to ``model`` by name, its effect times ``scale``; the originals are kept for unplugging.

    One delta can be in a model at a time. A delta that changes nothing, or a scale of zero, leaves the
    model alone, so that its logits are the base model's bit for bit.

    Args:
        model: the full model (or an emulator) that the delta's names belong to.
        scale: λ; 1 is what was tuned, 0 the base model. Low-rank and bottleneck updates are scaled at
            their second map, so that the whole update is λ times what was tuned.

    Raises:
        ArtifactRefused: the delta does not fit the model; names the tensor.
        ConfigError: the model has a delta in it already, or ``scale`` is no finite number.
    """
    check_fits(model, family, delta, scale)
    if delta.changes_nothing or scale == 0:
        return Plugged(None)
    method = METHODS[delta.method]()
    parameters = method.attach(model, family, delta.positions, delta.settings)
    try:
        method.load(delta.tensors, scale)
    except BaseException:
        method.detach()
        raise
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    return Plugged(method)


def check_fits(model: Any, family: Family, delta: Delta, scale: float = 1.0) -> None:
    """Checks a delta against the model it shall go into, before anything is touched.

    Raises:
        ArtifactRefused: unknown method, a layer the model lacks, a tensor that is missing, unknown,
            misshaped or not finite.
        ConfigError: ``scale`` is no finite number.
    """
    if not math.isfinite(scale):
        raise ConfigError(f"scale: expected a finite number, found {scale}.", "1 applies the delta as tuned.")
    if delta.method not in METHODS:
        raise ArtifactRefused(
            f"Delta: unknown method {delta.method!r}; known are {', '.join(METHODS)}.",
            "Install the version of scaleot_ray that the delta was made with.",
        )
    count, positions = len(family.layers(model)), delta.positions
    if not positions or list(positions) != sorted(set(positions)) or positions[0] < 0 or positions[-1] >= count:
        raise ArtifactRefused(
            f"Delta: plug-in layers {list(positions)}, but the model has layers 0 to {count - 1}.",
            "Use the delta with the model whose emulator it was tuned on.",
        )
    shapes = METHODS[delta.method].shapes(model, family, positions, delta.settings)
    check_tensors(delta.tensors, shapes, delta.method)
    for name, tensor in delta.tensors.items():
        if not torch.isfinite(tensor).all():
            raise ArtifactRefused(
                f"Delta ({delta.method}): tensor {name!r} has values that are not finite.",
                "Tune again with a lower learning rate.",
            )
