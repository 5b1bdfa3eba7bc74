from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from scaleot_ray.errors import ArtifactRefused, ConfigError
from scaleot_ray.families import family_of
from scaleot_ray.tuning import METHODS, PlugInMethod
from scaleot_ray.tuning.method import is_attached
from tests.tiny_models import TINY, tiny_model, tiny_tokens
from tests.tuning.tiny_batches import POSITIONS, bits, tiny_settings


def attach(model: nn.Module, name: str, positions: tuple[int, ...] = POSITIONS) -> PlugInMethod:
    family, method = family_of(model.config), METHODS[name]()
    method.attach(model, family, positions, method.settings(tiny_settings(name), family))
    return method


def shake(method: PlugInMethod) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in method.parameters.values():
            parameter.add_(0.1 * torch.randn_like(parameter))


def structure(model: nn.Module) -> list[object]:
    """Everything about a model but its values: modules, attributes, hooks, storage, flags."""
    modules = [
        (name, id(module), module.training, len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]
    parameters = [(name, id(p), p.data_ptr(), p.requires_grad, p.grad) for name, p in model.named_parameters()]
    return [modules, parameters, sorted(vars(model))]


@pytest.mark.parametrize("architecture", TINY)
@pytest.mark.parametrize("name", METHODS)
class TestEveryFamily:
    def test_untouched_gives_the_same_logits_and_detached_the_same_model(self, name: str, architecture: str) -> None:
        model, ids = tiny_model(architecture), tiny_tokens()
        with torch.no_grad():
            before, values, shape = model(ids).logits, bits(model), structure(model)
            method = attach(model, name)
            assert torch.equal(model(ids).logits, before)
            shake(method)
            assert not torch.equal(model(ids).logits, before)
            method.detach()
            assert torch.equal(model(ids).logits, before)
        assert structure(model) == shape
        after = bits(model)
        assert after.keys() == values.keys()
        assert all(torch.equal(after[key], values[key]) for key in values)

    def test_names_shapes_and_places(self, name: str, architecture: str) -> None:
        model = tiny_model(architecture)
        family, settings = family_of(model.config), METHODS[name].settings(tiny_settings(name), family_of(model.config))
        shapes = METHODS[name].shapes(model, family, POSITIONS, settings)
        method = attach(model, name)
        assert {key: value.shape for key, value in method.parameters.items()} == shapes
        assert {key: value.shape for key, value in method.changes().items()} == shapes
        trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
        assert trainable == {id(parameter) for parameter in method.parameters.values()}
        prefixes = {family.layer_prefix(position): 0 for position in POSITIONS}
        for key in shapes:
            prefixes[next(prefix for prefix in prefixes if key.startswith(prefix))] += 1
        assert len(set(prefixes.values())) == 1
        assert min(prefixes.values()) > 0
        if name == "lora":
            wanted = {p.path for p in family.attention + family.mlp}
            found = {re.sub(r"\.lora_[AB]$", "", key).removeprefix(family.layer_prefix(0)) for key in shapes}
            assert wanted == {target for target in found if not target.startswith(family.layers_path)}
        if name == "bottleneck":
            parts = {"down.weight", "down.bias", "up.weight", "up.bias"}
            assert shapes.keys() == {f"{prefix}bottleneck.{part}" for prefix in prefixes for part in parts}

    def test_gradients_reach_every_plug_in_parameter(self, name: str, architecture: str) -> None:
        model, ids = tiny_model(architecture), tiny_tokens()
        method = attach(model, name)
        shake(method)  # a zero second map gives the first one no gradient
        model(ids, labels=ids).loss.backward()
        without = [key for key, value in method.parameters.items() if value.grad is None or not value.grad.any()]
        # Attention without a positional term does not feel a constant added to every key.
        assert all(key.endswith(("k_proj.bias", "key.bias")) for key in without)


@pytest.mark.parametrize("name", METHODS)
def test_nothing_below_the_first_plug_in_layer_is_kept_for_backward(name: str) -> None:
    model, ids = tiny_model("llama"), tiny_tokens()
    attach(model, name, (6, 7))
    where, kept = -1, dict.fromkeys(range(8), 0)

    def enter(index: int) -> None:
        nonlocal where
        where = index

    for index, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda module, inputs, index=index: enter(index))

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if where >= 0 and tensor.numel() >= ids.numel() * 32:
            kept[where] += 1
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(ids)
    assert [kept[index] for index in range(6)] == [0] * 6
    assert kept[7] > 0


def test_whole_layers_train_a_copy() -> None:
    model = tiny_model("llama")
    received = {name: parameter.data for name, parameter in model.named_parameters()}
    copies = {name: value.clone() for name, value in received.items()}
    method = attach(model, "layers")
    shake(method)
    assert all(torch.equal(received[name], copies[name]) for name in received)
    changes = method.changes()
    for name, value in method.parameters.items():
        assert torch.equal(changes[name], value.detach() - received[name])


@pytest.mark.parametrize("name", METHODS)
def test_one_plug_in_at_a_time(name: str) -> None:
    model = tiny_model("gpt2")
    first = attach(model, name)
    with pytest.raises(ConfigError, match="carries a plug-in already"):
        attach(model, "layers")
    first.detach()
    first.detach()
    attach(model, "layers").detach()


@pytest.mark.parametrize("positions", [(), (1, 0), (0, 0), (-1, 0), (0, 8)])
def test_positions_the_model_lacks(positions: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"expected ascending depths between 0 and 7"):
        attach(tiny_model("llama"), "layers", positions)


def test_a_failed_attachment_leaves_the_model_alone() -> None:
    model = tiny_model("llama")
    model.model.layers[6].mlp.down_proj = nn.Sequential(model.model.layers[6].mlp.down_proj)
    shape, family = structure(model), family_of(model.config)
    settings = METHODS["lora"].settings(tiny_settings("lora"), family)
    with pytest.raises(ArtifactRefused, match=r"layers\.6\.mlp\.down_proj is no plain projection"):
        METHODS["lora"]().attach(model, family, POSITIONS, settings)
    assert structure(model) == shape
    assert not is_attached(model)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("lora", {"rank": 0, "alpha": 1.0, "targets": ["mlp.up_proj"]}, "'rank' is 0"),
        ("lora", {"rank": 2, "alpha": "x", "targets": ["mlp.up_proj"]}, "'alpha' is 'x'"),
        ("lora", {"rank": 2, "alpha": 1.0, "targets": ["lm_head"]}, "no projections of llama"),
        ("lora", {"rank": 2, "alpha": 1.0}, "no projections of llama"),
        ("bottleneck", {"width": 2, "activation": "sine"}, "'sine'"),
        ("bottleneck", {"activation": "gelu"}, "width None"),
    ],
)
def test_settings_of_a_delta_are_checked(name: str, settings: dict[str, object], message: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(ArtifactRefused, match=message):
        METHODS[name].shapes(model, family_of(model.config), POSITIONS, settings)


@pytest.mark.parametrize("name", ["lora", "bottleneck"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_added_parameters_are_at_least_fp32(name: str, dtype: torch.dtype) -> None:
    model, ids = tiny_model("llama").to(dtype), tiny_tokens()
    before = model(ids).logits
    method = attach(model, name)
    expected = torch.float64 if dtype is torch.float64 else torch.float32
    assert {value.dtype for value in method.parameters.values()} == {expected}
    assert torch.equal(model(ids).logits, before)
