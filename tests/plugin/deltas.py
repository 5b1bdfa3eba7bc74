"""Deltas with something in them, without tuning."""

from __future__ import annotations

from typing import Any

import torch

from scaleot_ray.families import family_of
from scaleot_ray.tuning import METHODS, Delta
from tests.tuning.tiny_batches import POSITIONS, tiny_settings


def random_delta(model: Any, method: str, seed: int = 0, size: float = 0.05) -> Delta:
    """A delta of ``method`` for ``model``, every tensor normal with deviation ``size``."""
    family = family_of(model.config)
    settings = METHODS[method].settings(tiny_settings(method), family)
    shapes = METHODS[method].shapes(model, family, POSITIONS, settings)
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.promote_types(model.dtype, torch.float32)
    tensors = {name: size * torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}
    return Delta(method, POSITIONS, settings, tensors)


def untouched_delta(model: Any, method: str) -> Delta:
    """The delta of a method that was attached and never stepped: zeros, or low-rank pairs with B zero."""
    family, instance = family_of(model.config), METHODS[method]()
    settings = instance.settings(tiny_settings(method), family)
    instance.attach(model, family, POSITIONS, settings)
    tensors = instance.changes()
    instance.detach()
    return Delta(method, POSITIONS, settings, tensors)
