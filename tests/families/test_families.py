"""Every architecture: layers found, projections there, fused parts are what the model itself takes as q, k and v."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from scaleot_ray.errors import ConfigError, UnsupportedArchitectureError
from scaleot_ray.families import FAMILIES, Projection, dense_weight, family_of, hidden_size, layer_count
from scaleot_ray.families.family import head_size
from tests.tiny_models import TINY, tiny_model, tiny_tokens

FUSED = ("phi3", "phi3-sliding", "gpt2", "neox", "neox-sequential", "bloom")
BY_NAME = tuple(name for name in TINY if name not in FUSED)


def _fused(model: Any) -> tuple[Projection, Any, tuple[torch.Tensor, ...]]:
    """The first layer's fused projection: description, module, rows of each part."""
    family = family_of(model.config)
    projection = family.attention[0]
    assert projection.parts is not None
    return projection, family.layers(model)[0].get_submodule(projection.path), projection.parts(model.config)


@torch.no_grad()
def _keys_and_values(model: Any, layer: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """What the model itself keeps as key and value: (batch, heads, time, head size) each."""
    cache = model(tiny_tokens(), use_cache=True).past_key_values.layers[layer]
    return cache.keys, cache.values


@torch.no_grad()
def _scale_rows(module: Any, rows: torch.Tensor, factor: float) -> None:
    dense_weight(module)[rows] *= factor
    if module.bias is not None:
        module.bias[rows] *= factor


@pytest.mark.parametrize("name", TINY)
def test_layers_are_found_and_replaceable(name: str) -> None:
    model = tiny_model(name)
    family = family_of(model.config)
    layers = family.layers(model)
    assert len(layers) == layer_count(model.config) == 8
    assert hidden_size(model.config) == 32
    inside = {key for key, _ in model.named_parameters() if key.startswith(family.layer_prefix(3))}
    assert inside == {family.layer_prefix(3) + key for key, _ in layers[3].named_parameters()}
    before = model(tiny_tokens()).logits
    layers[3] = _Identity(layers[3], family.returns_tuple)
    assert not torch.equal(model(tiny_tokens()).logits, before)


@pytest.mark.parametrize("name", TINY)
def test_a_layer_maps_hidden_states_to_hidden_states(name: str) -> None:
    model = tiny_model(name)
    family = family_of(model.config)
    seen: list[torch.Tensor] = []
    family.layers(model)[2].register_forward_hook(lambda _m, _i, output: seen.append(family.layer_output(output)))
    model(tiny_tokens(batch=2, time=12))
    assert [tuple(hidden.shape) for hidden in seen] == [(2, 12, 32)]


@pytest.mark.parametrize("name", TINY)
def test_projections_are_exactly_the_layers_matrices(name: str) -> None:
    model = tiny_model(name)
    family = family_of(model.config)
    for layer in family.layers(model):
        described = [layer.get_submodule(projection.path) for projection in (*family.attention, *family.mlp)]
        matrices = [module for module in layer.modules() if getattr(module, "weight", torch.zeros(1)).dim() == 2]
        assert {id(module) for module in described} == {id(module) for module in matrices}
        for module in described:
            x = torch.randn(3, dense_weight(module).shape[1])
            bias = module.bias if module.bias is not None else 0.0
            assert torch.allclose(module(x), x @ dense_weight(module).t() + bias, atol=1e-5)


@pytest.mark.parametrize("name", FUSED)
def test_fused_parts_cover_every_row_once(name: str) -> None:
    _, module, parts = _fused(tiny_model(name))
    assert len(parts) == 3
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(dense_weight(module).shape[0]))


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("part", [0, 1, 2])
def test_zeroing_a_fused_part_zeroes_what_the_model_uses_for_it(name: str, part: int) -> None:
    model = tiny_model(name)
    keys, values = _keys_and_values(model)
    before = model(tiny_tokens()).logits
    _, module, parts = _fused(model)
    _scale_rows(module, parts[part], 0.0)
    new_keys, new_values = _keys_and_values(model)
    assert torch.equal(new_keys, torch.zeros_like(keys) if part == 1 else keys)
    assert torch.equal(new_values, torch.zeros_like(values) if part == 2 else values)
    assert not torch.equal(model(tiny_tokens()).logits, before)


@pytest.mark.parametrize("name", FUSED)
def test_without_queries_attention_is_uniform(name: str) -> None:
    # The first token sees itself only, so it is the one whose output needs no query.
    model = tiny_model(name)
    before = model(tiny_tokens()).logits
    for layer in family_of(model.config).layers(model):
        projection, _, parts = _fused(model)
        _scale_rows(layer.get_submodule(projection.path), parts[0], 0.0)
    after = model(tiny_tokens()).logits
    assert torch.allclose(after[:, 0], before[:, 0], atol=1e-5)
    assert not torch.allclose(after[:, -1], before[:, -1], atol=1e-4)


@pytest.mark.parametrize("name", FUSED)
def test_rows_of_a_fused_part_are_in_the_order_of_the_heads(name: str) -> None:
    size = head_size(tiny_model(name).config)
    for part in (1, 2):
        for row in (0, size, 2 * size - 1):
            model = tiny_model(name)
            before = _keys_and_values(model)[part - 1]
            _, module, parts = _fused(model)
            _scale_rows(module, parts[part][row : row + 1], 3.0)
            changed = (_keys_and_values(model)[part - 1] != before).any(-1).any(-1).any(0)
            assert changed.nonzero().flatten().tolist() == [row // size]


@pytest.mark.parametrize("name", FUSED)
def test_a_wrong_split_would_be_noticed(name: str) -> None:
    model = tiny_model(name)
    _, module, parts = _fused(model)
    shifted = torch.cat((parts[1][1:], parts[2][:1]))
    _scale_rows(module, shifted, 0.0)
    keys, _ = _keys_and_values(model)
    assert keys.abs().max() > 0


@pytest.mark.parametrize("name", BY_NAME)
def test_separate_projections_are_query_key_value_in_this_order(name: str) -> None:
    for part in range(3):
        model = tiny_model(name)
        family = family_of(model.config)
        keys, values = _keys_and_values(model)
        module = family.layers(model)[0].get_submodule(family.attention[part].path)
        _scale_rows(module, torch.arange(dense_weight(module).shape[0]), 0.0)
        new_keys, new_values = _keys_and_values(model)
        assert torch.equal(new_keys, torch.zeros_like(keys) if part == 1 else keys)
        assert torch.equal(new_values, torch.zeros_like(values) if part == 2 else values)


def test_phi3_gate_and_up_are_the_parts_of_its_mlp() -> None:
    model = tiny_model("phi3")
    family = family_of(model.config)
    mlp = family.layers(model)[0].mlp
    assert family.mlp[0].parts is not None
    gate, up = family.mlp[0].parts(model.config)
    x = torch.randn(5, 32)
    weight = dense_weight(mlp.gate_up_proj)
    by_hand = mlp.down_proj(torch.nn.functional.silu(x @ weight[gate].t()) * (x @ weight[up].t()))
    assert torch.allclose(mlp(x), by_hand, atol=1e-6)


def test_grouped_query_attention_has_fewer_key_and_value_rows() -> None:
    for name in ("llama", "mistral-sliding", "qwen2", "qwen3", "gemma2", "gemma3", "smollm3"):
        layer = family_of(TINY[name]()).layers(tiny_model(name))[0]
        shapes = [tuple(dense_weight(getattr(layer.self_attn, f"{part}_proj")).shape) for part in "qkv"]
        assert shapes == [(32, 32), (16, 32), (16, 32)]
    _, module, parts = _fused(tiny_model("phi3"))
    assert [len(part) for part in parts] == [32, 16, 16]
    assert dense_weight(module).shape == (64, 32)


@pytest.mark.parametrize("name", TINY)
def test_tied_and_untied_heads_are_both_among_the_models(name: str) -> None:
    model = tiny_model(name)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == model.config.tie_word_embeddings
    untied = {
        "llama-untied-bias",
        "mistral-sliding",
        "qwen2",
        "qwen3",
        "phi3",
        "phi3-sliding",
        "neox",
        "neox-sequential",
    }
    assert tied == (name not in untied)


def test_biases_are_part_of_the_projections() -> None:
    for name in ("llama-untied-bias", "qwen2", "gpt2", "opt", "opt-post-norm", "neox", "neox-sequential", "bloom"):
        model = tiny_model(name)
        family = family_of(model.config)
        module = family.layers(model)[0].get_submodule(family.attention[0].path)
        assert module.bias is not None
        assert module.bias.abs().max() > 0


def test_residuals_norms_embeddings_and_positions_of_both_ways_are_among_the_models() -> None:
    assert {TINY[name]().use_parallel_residual for name in ("neox", "neox-sequential")} == {True, False}
    before, after = (tiny_model(name).model.decoder for name in ("opt", "opt-post-norm"))
    assert before.final_layer_norm is not None
    assert before.project_in is None
    assert after.final_layer_norm is None
    assert (after.project_in.in_features, after.project_in.out_features) == (16, 32)
    assert set(TINY["smollm3"]().no_rope_layers) == {0, 1}


@pytest.mark.parametrize("name", ["mistral-sliding", "gemma2", "gemma3", "qwen2", "smollm3", "phi3-sliding"])
@torch.no_grad()
def test_a_sliding_window_really_limits_what_is_seen(name: str) -> None:
    model = tiny_model(name)
    family = family_of(model.config)
    kinds = getattr(model.config, "layer_types", None) or ["sliding_attention"] * 8
    assert model.config.sliding_window == 8
    tokens = tiny_tokens(batch=1, time=24)
    other = tokens.clone()
    other[0, 0] = 3 if tokens[0, 0] != 3 else 4
    seen: dict[str, torch.Tensor] = {}
    index = kinds.index("sliding_attention")
    attention = family.layers(model)[index].self_attn
    attention.register_forward_pre_hook(lambda _m, _a, kw: seen.update(x=kw["hidden_states"]), with_kwargs=True)
    attention.register_forward_hook(lambda _m, _i, output: seen.update(y=output[0]))
    # One layer alone, so that nothing reaches far tokens through the layers before it.
    for earlier in range(index):
        family.layers(model)[earlier] = _Identity(family.layers(model)[earlier])
    model(tokens)
    first = dict(seen)
    model(other)
    assert not torch.equal(first["y"][0, 0], seen["y"][0, 0])
    assert torch.equal(first["y"][0, 8:], seen["y"][0, 8:])


class _Identity(torch.nn.Module):
    def __init__(self, layer: Any, returns_tuple: bool = False) -> None:
        super().__init__()
        self.attention_type = getattr(layer, "attention_type", None)
        self.returns_tuple = returns_tuple

    def forward(self, hidden_states: torch.Tensor, *_args: Any, **_kwargs: Any) -> Any:
        return (hidden_states, None) if self.returns_tuple else hidden_states


def test_every_model_type_has_a_tiny_model() -> None:
    types = {model_type for family in FAMILIES for model_type in family.model_types}
    assert {config().model_type for config in TINY.values()} == types


def test_no_model_type_belongs_to_two_families() -> None:
    types = [model_type for family in FAMILIES for model_type in family.model_types]
    assert len(types) == len(set(types))


def test_an_unknown_architecture_is_told_how_to_be_added() -> None:
    with pytest.raises(UnsupportedArchitectureError) as caught:
        family_of(SimpleNamespace(model_type="mamba"))
    assert "'mamba'" in caught.value.problem
    for known in ("llama", "gpt2", "opt", "gpt_neox", "bloom", "phi3"):
        assert known in caught.value.problem
    assert "scaleot_ray/families/__init__.py" in caught.value.remedy
    assert isinstance(caught.value, ConfigError)
    assert caught.value.exit_code == 2
