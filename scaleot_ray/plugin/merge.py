"""A delta folded into the full model's own weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from scaleot_ray.errors import ArtifactRefused, ConfigError
from scaleot_ray.families import Family
from scaleot_ray.plugin.plug import check_fits
from scaleot_ray.tuning.delta import Delta
from scaleot_ray.tuning.layers import changed
from scaleot_ray.tuning.lora import alpha_of, rank_of, target_modules
from scaleot_ray.tuning.method import delta_dtype, is_attached


def merge(model: Any, family: Family, delta: Delta, scale: float = 1.0) -> None:
    """Folds ``delta`` into ``model`` for good: afterwards it is a plain model of its architecture.

    For ``layers`` the logits are those of the plugged model; for ``lora`` they are up to the rounding of
    W + B·A to the type of W.

    Raises:
        ArtifactRefused: the delta does not fit the model; names the tensor.
        ConfigError: the delta is a ``bottleneck``, which cannot be merged, or the model has a delta in it.
    """
    for name, tensor in merged_weights(model, family, delta, scale).items():
        model.get_parameter(name).data = tensor


def merged_weights(model: Any, family: Family, delta: Delta, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """The parameters that merging changes, by name, as new tensors; the model stays as it is.

    Raises:
        ArtifactRefused, ConfigError: as :func:`merge`; also where a merged value is not finite in the weight's type.
    """
    check_fits(model, family, delta, scale)
    if is_attached(model):
        raise ConfigError("The model has a delta in it already.", "Unplug it before merging.")
    check_mergeable(delta.method)
    merged = _merged(model, family, delta, scale)
    for name, tensor in merged.items():
        if not torch.isfinite(tensor).all():
            raise ArtifactRefused(
                f"Delta ({delta.method}): with it, {name!r} has values that {tensor.dtype} cannot hold.",
                "Give a smaller scale, or build, tune and plug with model.dtype bfloat16 or float32, which hold larger "
                "values; such a large change may also be a tuning that went wrong.",
            )
    return merged


def check_mergeable(method: str) -> None:
    """Refuses a method whose deltas cannot become part of the model's own weights.

    Raises:
        ConfigError: it is ``bottleneck``.
    """
    if method == "bottleneck":
        raise ConfigError(
            "A bottleneck delta adds a layer with an activation and cannot be merged into the model's weights.",
            "Keep it plugged at run time (scaleot_ray.plugin.plug), or tune with the method lora or layers instead.",
        )


def _merged(model: Any, family: Family, delta: Delta, scale: float) -> dict[str, torch.Tensor]:
    if delta.method == "layers":
        return {name: changed(model.get_parameter(name).data, tensor, scale) for name, tensor in delta.tensors.items()}
    factor, result = scale * alpha_of(delta.settings) / rank_of(delta.settings), {}
    for name in target_modules(family, delta.positions, delta.settings):
        module = model.get_submodule(name)
        weight = module.weight.data
        down, up = (
            delta.tensors[f"{name}.{part}"].to(weight.device, delta_dtype(weight.dtype))
            for part in ("lora_A", "lora_B")
        )
        update = up @ down  # (out, in)
        result[f"{name}.weight"] = changed(weight, update.t() if isinstance(module, Conv1D) else update, factor)
    return result
