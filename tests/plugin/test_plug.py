from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from scaleot_ray.errors import ArtifactRefused, ConfigError
from scaleot_ray.families import family_of
from scaleot_ray.plugin import plug
from scaleot_ray.tuning import METHODS, Delta, tune
from scaleot_ray.tuning.method import is_attached
from tests.plugin.deltas import random_delta, untouched_delta
from tests.tiny_models import TINY, tiny_model, tiny_tokens
from tests.tuning.tiny_batches import POSITIONS, bits, tiny_batches, tiny_settings


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(tiny_tokens()).logits
    return result


def put(model: Any, delta: Delta, scale: float = 1.0) -> Any:
    return plug(model, family_of(model.config), delta, scale)


def identical(model: Any, values: dict[str, torch.Tensor]) -> bool:
    """Same names and the same bits, −0.0 told apart from 0.0."""
    now = bits(model)
    return now.keys() == values.keys() and all(
        torch.equal(now[name], value) and torch.equal(now[name].signbit(), value.signbit())
        for name, value in values.items()
    )


@pytest.mark.parametrize("architecture", TINY)
@pytest.mark.parametrize("method", METHODS)
def test_an_untouched_delta_gives_the_base_logits_and_unplugging_every_bit(method: str, architecture: str) -> None:
    model = tiny_model(architecture)
    base, values = logits(model), bits(model)
    untouched = put(model, untouched_delta(model, method))
    assert torch.equal(logits(model), base)
    assert identical(model, values)
    untouched.unplug()
    plugged = put(model, random_delta(model, method))
    assert not torch.allclose(logits(model), base, atol=1e-3)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    plugged.unplug()
    assert torch.equal(logits(model), base)
    assert identical(model, values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_other_types_come_back_bit_for_bit(method: str, dtype: torch.dtype) -> None:
    model = tiny_model("gpt2").to(dtype)
    base, values = logits(model), bits(model)
    with put(model, random_delta(model, method)):
        assert not torch.equal(logits(model), base)
        assert logits(model).dtype is dtype
    assert identical(model, values)
    assert torch.equal(logits(model), base)


def test_zero_changes_keep_negative_zeros() -> None:
    model = tiny_model("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    model.get_parameter(name).data[0] = -0.0
    delta = random_delta(model, "layers")
    delta.tensors[name].zero_()
    with put(model, delta):
        assert model.get_parameter(name)[0].signbit().all()
    # A plain sum does not.
    assert not (torch.tensor(-0.0) + 0.0).signbit()


def test_every_attached_parameter_of_an_untouched_method_is_neutral() -> None:
    """The shortcut for deltas that change nothing hides nothing: attached pairs with B zero are neutral too."""
    model = tiny_model("llama")
    base = logits(model)
    delta = untouched_delta(model, "lora")
    delta.tensors["model.layers.7.mlp.down_proj.lora_B"][0, 0] = 1e-30
    assert not delta.changes_nothing
    with put(model, delta):
        assert is_attached(model)
        assert torch.equal(logits(model), base)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom"])
@pytest.mark.parametrize("method", METHODS)
def test_plugged_is_what_was_tuned(method: str, architecture: str) -> None:
    model, seen = tiny_model(architecture), []

    def evaluate() -> float:
        seen.append(logits(model))
        return 0.0

    family = family_of(model.config)
    settings = tiny_settings(method, learning_rate=1e-2, evaluate_every=6)
    delta = tune(model, family, POSITIONS, tiny_batches(), settings, evaluate=evaluate).delta
    base = logits(model)
    with plug(model, family, delta):
        plugged = logits(model)
    assert not torch.allclose(seen[-1], base, atol=1e-3)
    if method == "layers":  # received + (tuned − received) rounds
        torch.testing.assert_close(plugged, seen[-1], rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(plugged, seen[-1])


def test_low_precision_layers_plug_as_they_were_tuned() -> None:
    model, seen = tiny_model("llama").bfloat16(), []

    def evaluate() -> float:
        seen.append(bits(model))
        return 0.0

    family = family_of(model.config)
    settings = tiny_settings("layers", learning_rate=1e-3, evaluate_every=6)
    delta = tune(model, family, POSITIONS, tiny_batches(), settings, evaluate=evaluate).delta
    with plug(model, family, delta):
        assert identical(model, seen[-1])


@pytest.mark.parametrize("method", METHODS)
def test_scale(method: str) -> None:
    model = tiny_model("llama").double()
    delta, base = random_delta(model, method, size=1e-3 if method == "lora" else 1e-5), logits(model)
    effects = []
    for scale in (1.0, 0.5, -1.0):
        with put(model, delta, scale):
            effects.append(logits(model) - base)
    assert effects[0].abs().max() > 1e-7
    torch.testing.assert_close(effects[1], 0.5 * effects[0], rtol=0.05, atol=effects[0].abs().max() * 0.01)
    torch.testing.assert_close(effects[2], -effects[0], rtol=0.05, atol=effects[0].abs().max() * 0.01)
    values = bits(model)
    with put(model, delta, 0.0):
        assert torch.equal(logits(model), base)
        assert identical(model, values)


def test_scaled_layers_are_received_plus_scale_times_change() -> None:
    model = tiny_model("llama")
    delta, before = random_delta(model, "layers"), bits(model)
    with put(model, delta, 0.25):
        for name, change in delta.tensors.items():
            assert torch.equal(model.get_parameter(name), before[name] + 0.25 * change)


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_scale_must_be_finite(scale: float) -> None:
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match="expected a finite number"):
        put(model, random_delta(model, "layers"), scale)


@pytest.mark.parametrize("method", METHODS)
def test_one_delta_at_a_time(method: str) -> None:
    model = tiny_model("llama")
    values = bits(model)
    plugged = put(model, random_delta(model, method))
    inside = logits(model)
    with pytest.raises((ConfigError, ArtifactRefused)) as refused:
        put(model, random_delta(tiny_model("llama"), "bottleneck", seed=1))
    assert "carries a plug-in already" in refused.value.problem
    assert torch.equal(logits(model), inside)
    plugged.unplug()
    plugged.unplug()
    assert identical(model, values)
    put(model, random_delta(model, method)).unplug()
    assert identical(model, values)


def test_an_error_inside_the_block_unplugs() -> None:
    model = tiny_model("llama")
    values = bits(model)
    with pytest.raises(RuntimeError), put(model, random_delta(model, "lora")):
        raise RuntimeError
    assert identical(model, values)
    assert not is_attached(model)


def spoiled(delta: Delta, how: str) -> Delta:
    name = next(reversed(delta.tensors))
    if how == "missing":
        del delta.tensors[name]
    elif how == "extra":
        delta.tensors[name.replace(".7.", ".3.")] = delta.tensors[name]
    elif how == "misshaped":
        delta.tensors[name] = delta.tensors[name][:-1]
    else:
        delta.tensors[name].view(-1)[0] = float(how)
    return delta


@pytest.mark.parametrize("how", ["missing", "extra", "misshaped", "nan", "inf"])
@pytest.mark.parametrize("method", METHODS)
def test_a_delta_that_does_not_fit_is_refused_by_name(method: str, how: str) -> None:
    model = tiny_model("llama")
    values, delta = bits(model), random_delta(model, method)
    name = next(reversed(delta.tensors))
    named = name.replace(".7.", ".3.") if how == "extra" else name
    with pytest.raises(ArtifactRefused) as refused:
        put(model, spoiled(delta, how))
    assert f"'{named}'" in refused.value.problem
    assert identical(model, values)
    assert not is_attached(model)


@pytest.mark.parametrize("method", METHODS)
def test_a_delta_of_another_model_is_refused(method: str) -> None:
    with pytest.raises(ArtifactRefused):
        put(tiny_model("gpt2"), random_delta(tiny_model("llama"), method))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"method": "prefix"}, "unknown method 'prefix'"), ({"positions": (6, 8)}, "the model has layers 0 to 7")],
)
def test_what_a_delta_says_of_itself_is_checked(change: dict[str, Any], message: str) -> None:
    model = tiny_model("llama")
    delta = random_delta(model, "layers")
    with pytest.raises(ArtifactRefused, match=message):
        put(model, Delta(**{**vars(delta), **change}))


def test_plugging_does_not_write_into_shared_tensors() -> None:
    model = tiny_model("llama")
    storage = {name: parameter.data for name, parameter in model.named_parameters()}
    copies = {name: value.clone() for name, value in storage.items()}
    with put(model, random_delta(model, "layers")):
        assert all(torch.equal(storage[name], copies[name]) for name in storage)
    assert all(parameter.data_ptr() == storage[name].data_ptr() for name, parameter in model.named_parameters())
