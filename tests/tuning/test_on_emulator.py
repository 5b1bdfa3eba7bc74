from __future__ import annotations

from typing import Any

import pytest
import torch

from scaleot_ray.emulator.harmonizer import DroppedLayer, Harmonizer
from scaleot_ray.families import family_of
from scaleot_ray.plugin import plug
from scaleot_ray.tuning import METHODS, tune
from tests.tiny_models import TINY, tiny_model, tiny_tokens
from tests.tuning.tiny_batches import POSITIONS, tiny_batches, tiny_settings


def emulator(architecture: str) -> Any:
    """A tiny model with one layer replaced by a harmonizer and one dropped."""
    model = tiny_model(architecture)
    family = family_of(model.config)
    layers = family.layers(model)
    torch.manual_seed(3)
    layers[3] = Harmonizer(32, 4, "silu", family.returns_tuple)
    layers[4] = DroppedLayer(family.returns_tuple)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("architecture", TINY)
@pytest.mark.parametrize("method", METHODS)
def test_a_delta_tuned_on_an_emulator_plugs_into_the_full_model(method: str, architecture: str) -> None:
    model, full, ids = emulator(architecture), tiny_model(architecture), tiny_tokens()
    family = family_of(model.config)
    tuned = tune(model, family, POSITIONS, tiny_batches(), tiny_settings(method, steps=2, learning_rate=1e-2))
    again = tune(
        model,
        family,
        POSITIONS,
        tiny_batches(),
        tiny_settings(method, steps=2, learning_rate=1e-2, gradient_checkpointing=True),
    )
    assert all(torch.equal(again.delta.tensors[name], value) for name, value in tuned.delta.tensors.items())
    with torch.no_grad():
        before = full(ids).logits
        with plug(full, family, tuned.delta):
            assert not torch.allclose(full(ids).logits, before, atol=1e-4)
        assert torch.equal(full(ids).logits, before)
