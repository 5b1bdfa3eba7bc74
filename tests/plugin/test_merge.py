from __future__ import annotations

import pytest
import torch

from scaleot_ray.errors import ArtifactRefused, ConfigError
from scaleot_ray.families import family_of
from scaleot_ray.plugin import merge, merged_weights, plug
from tests.plugin.deltas import random_delta, untouched_delta
from tests.plugin.test_plug import identical, logits
from tests.tiny_models import TINY, tiny_model
from tests.tuning.tiny_batches import POSITIONS, bits


@pytest.mark.parametrize("architecture", TINY)
@pytest.mark.parametrize("method", ["layers", "lora"])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_merged_is_plugged(method: str, architecture: str, scale: float) -> None:
    model = tiny_model(architecture)
    family, delta, base = family_of(model.config), random_delta(model, method, size=0.1), logits(model)
    before = bits(model)
    with plug(model, family, delta, scale):
        plugged = logits(model)
    assert not torch.allclose(plugged, base, atol=1e-2)
    merge(model, family, delta, scale)
    if method == "layers":
        assert torch.equal(logits(model), plugged)
    else:
        torch.testing.assert_close(logits(model), plugged, rtol=1e-4, atol=1e-5)
    after = bits(model)
    assert after.keys() == before.keys()
    prefixes = tuple(family.layer_prefix(position) for position in POSITIONS)
    assert all(name.startswith(prefixes) or torch.equal(after[name], before[name]) for name in after)


@pytest.mark.parametrize("method", ["layers", "lora"])
def test_an_untouched_delta_merges_to_the_same_bits(method: str) -> None:
    model = tiny_model("gpt2").bfloat16()
    before = bits(model)
    merge(model, family_of(model.config), untouched_delta(model, method))
    assert identical(model, before)


@pytest.mark.parametrize("method", ["layers", "lora"])
def test_weights_keep_their_type(method: str) -> None:
    model = tiny_model("llama").bfloat16()
    weights = merged_weights(model, family_of(model.config), random_delta(model, method))
    assert weights
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}


def test_a_bottleneck_is_refused_with_a_way_out() -> None:
    model = tiny_model("llama")
    before = bits(model)
    with pytest.raises(ConfigError, match="cannot be merged") as refused:
        merge(model, family_of(model.config), random_delta(model, "bottleneck"))
    assert "Keep it plugged" in refused.value.remedy
    assert "lora or layers" in refused.value.remedy
    assert identical(model, before)


def test_a_plugged_model_is_not_merged_into() -> None:
    model = tiny_model("llama")
    family, delta = family_of(model.config), random_delta(model, "layers")
    with plug(model, family, delta), pytest.raises(ConfigError, match="has a delta in it already"):
        merge(model, family, delta)


def test_a_delta_that_does_not_fit_is_refused() -> None:
    model = tiny_model("llama")
    delta = random_delta(model, "lora")
    delta.tensors.popitem()
    with pytest.raises(ArtifactRefused, match="is missing"):
        merge(model, family_of(model.config), delta)


@pytest.mark.parametrize("method", ["layers", "lora"])
def test_what_the_weights_type_cannot_hold_is_refused(method: str) -> None:
    model = tiny_model("llama").half()
    family, delta, before = family_of(model.config), random_delta(model, method, size=1.0), bits(model)
    assert merged_weights(model, family, delta)
    with pytest.raises(ArtifactRefused, match=r"'model\.layers\..* that torch\.float16 cannot hold") as refused:
        merge(model, family, delta, scale=1e6)
    assert "smaller scale" in refused.value.remedy
    assert identical(model, before)
