"""A model's config as it crosses between parties: what builds the architecture, and nothing else.

A Hugging Face config takes any key as an attribute and lets some rename others, and some of these choose code to be
fetched. What the owner's ``config.json`` says besides is nobody else's business.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING
from transformers.modeling_rope_utils import RopeParameters

from scaleot_ray.errors import ArtifactRefused
from scaleot_ray.families import family_of, layer_count
from scaleot_ray.plain_text import plain_line

MOST_LAYERS = 4096
LARGEST = 1 << 24
"""Largest whole number in a config; sizes beyond it would fill the reader's memory."""

_ROPE = ("rope_parameters", "rope_scaling")
# Names of before, which config classes still turn into ``rope_parameters``.
_LEGACY = ("rope_scaling", "rope_theta", "rope_local_base_freq", "partial_rotary_factor", "rotary_pct")
_ROPE_KEYS = {*RopeParameters.__annotations__, "type"}
_LAYER_TYPES = ("full_attention", "sliding_attention")
# Declared by every class, but nothing that a causal LM is built from.
_BESIDE = {"architectures", "id2label", "label2id", "output_hidden_states", "problem_type", "return_dict"}
# transformers writes these itself; they are left out without a word.
_WRITTEN = {"_name_or_path", "_sliding_window_pattern", "_attn_implementation_autoset", "_attn_implementation"}
_REBUILD = "Build the emulator again with scaleot_ray; manifests are not edited by hand."


def architecture_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of a config's ``to_dict()``, the fields that its class declares and that the architecture follows from.

    Raises:
        UnsupportedArchitectureError: no family knows its ``model_type``.
    """
    declared = _declared(values)
    kept = {"model_type": values["model_type"]}
    for key, value in values.items():
        if key in _ROPE and isinstance(value, Mapping):
            kept[key] = _rope(value)
        elif key in declared and not isinstance(value, Mapping):
            kept[key] = value
    return kept


def read_config(values: Mapping[str, Any] | None, layers: int | None = None) -> Any:
    """The Hugging Face config that another party's manifest describes.

    Fields that the class does not declare are left out.

    Args:
        values: ``model_config_json`` of a manifest.
        layers: decoder layers that it must have, where that is known.

    Raises:
        ArtifactRefused: there is none, of no known model, with a wrong or absurd number of layers, or with keys
            that would change what other keys mean.
    """
    try:
        values = dict(values or {})
        declared = _declared(values)
        _check_keys(values, declared)
        _check_sizes(values, layers)
        kept = architecture_fields(values)
        config = CONFIG_MAPPING[kept.pop("model_type")](**kept)
        found = layer_count(config)
    except ArtifactRefused:
        raise
    except Exception as error:  # a config class may raise anything on values that come from outside
        reason = plain_line(str(error) or type(error).__name__)[:200]
        raise ArtifactRefused(f"model_config_json describes no known model ({reason}).", _REBUILD) from None
    _check_layers(found, layers)
    return config


def _declared(values: Mapping[str, Any]) -> set[str]:
    model_type = values.get("model_type")
    family_of(_Named(str(model_type)))
    names = {field.name for field in dataclasses.fields(CONFIG_MAPPING[str(model_type)])}
    return (names | {*_LEGACY}) - _BESIDE


@dataclasses.dataclass(frozen=True)
class _Named:
    model_type: str


def _rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary positions, for all layers or by type of layer."""
    kept = {key: value for key, value in values.items() if key in _ROPE_KEYS and not isinstance(value, Mapping)}
    return kept | {
        kind: _rope(value) for kind, value in values.items() if kind in _LAYER_TYPES and isinstance(value, Mapping)
    }


def _check_keys(values: Mapping[str, Any], declared: set[str]) -> None:
    for key, value in values.items():
        hidden = key.startswith("_") and key not in declared and key not in _WRITTEN
        nested = isinstance(value, Mapping) and key not in {*_ROPE, *_BESIDE, "auto_map"}
        if key == "attribute_map" or hidden or nested or (key in _ROPE and value and _rope(value) != value):
            raise ArtifactRefused(f"model_config_json: {key!r} is no part of a model's architecture.", _REBUILD)


def _check_sizes(values: Mapping[str, Any], layers: int | None) -> None:
    """Before a config is made of them: some classes make lists of as many items as there are layers."""
    for key, value in values.items():
        if isinstance(value, int) and abs(value) > LARGEST:
            raise ArtifactRefused(f"model_config_json: {key} is {value}, above {LARGEST}.", _REBUILD)
    alias = CONFIG_MAPPING[values["model_type"]].attribute_map.get("num_hidden_layers", "num_hidden_layers")
    if isinstance(given := values.get(alias), int):
        _check_layers(given, layers)


def _check_layers(found: int, expected: int | None) -> None:
    if expected is not None and found != expected:
        raise ArtifactRefused(f"layer_map has {expected} layers, the model has {found}.", _REBUILD)
    if not 0 < found <= MOST_LAYERS:
        raise ArtifactRefused(f"model_config_json: {found} layers; 1 to {MOST_LAYERS} are possible.", _REBUILD)
