"""A config that another party sends makes the model it says, and nothing else."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import transformers

from scaleot_ray.errors import ArtifactRefused
from scaleot_ray.families.config_fields import architecture_fields, read_config
from tests.tiny_models import TINY


def crossed(config: Any) -> dict[str, Any]:
    """What leaves of a config, as a manifest has it."""
    kept: dict[str, Any] = json.loads(json.dumps(architecture_fields(config.to_dict())))
    return kept


@pytest.mark.parametrize("name", TINY)
def test_every_architecture_comes_back(name: str) -> None:
    config = TINY[name]()
    assert read_config(crossed(config), 8).to_dict() == config.to_dict()
    # An emulator of before holds all that the config says.
    assert read_config(json.loads(json.dumps(config.to_dict())), 8).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    "config",
    [
        transformers.LlamaConfig(rope_scaling={"type": "linear", "factor": 2.0}, rope_theta=5e5),
        transformers.LlamaConfig(rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e6}),
        transformers.GPTNeoXConfig(rotary_pct=0.5, rotary_emb_base=20000),
        transformers.Phi3Config(
            rope_scaling={"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
            auto_map={"AutoConfig": "configuration_phi3.Phi3Config"},
        ),
        transformers.Qwen2Config(layer_types=["full_attention"] * 32, eos_token_id=[1, 2]),
    ],
)
def test_rotary_positions_of_real_configs_come_back(config: Any) -> None:
    expected = {key: value for key, value in config.to_dict().items() if key != "auto_map"}
    assert read_config(crossed(config)).to_dict() == expected


def test_what_is_not_of_the_architecture_does_not_leave() -> None:
    config = TINY["llama"]()
    config.internal_notes = {"bucket": "s3://owner"}
    config.internal_path = "s3://owner"
    config.architectures = ["s3://owner"]
    config.rope_parameters["note"] = "s3://owner"
    assert "s3://owner" not in json.dumps(crossed(config))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"attribute_map": {"zz": "_attn_implementation_internal"}, "zz": "some/kernel"}, "'attribute_map' is no part"),
        ({"_attn_implementation_internal": "some/kernel"}, "'_attn_implementation_internal' is no part"),
        ({"text_config": {"hidden_size": 1}}, "'text_config' is no part"),
        ({"rope_parameters": {"rope_type": "default", "rows": ["Alice"]}}, "'rope_parameters' is no part"),
        ({"num_hidden_layers": 9}, "layer_map has 8 layers, the model has 9"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, above"),
        ({"max_position_embeddings": 10**12}, "max_position_embeddings is 10"),
        ({"num_hidden_layers": "many"}, "no known model"),
        ({"model_type": ["llama"]}, "no known model"),
        ({"model_type": "bert"}, "no known model"),
    ],
)
def test_what_would_change_or_hang_the_reader_is_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactRefused, match=message):
        read_config({**crossed(TINY["llama"]()), **more}, 8)


@pytest.mark.parametrize("name", ["smollm3", "gpt2", "qwen2"])
def test_too_many_layers_are_counted_before_lists_are_made_of_them(name: str) -> None:
    values = crossed(TINY[name]()) | {
        "layer_types": None,
        "n_layer" if name == "gpt2" else "num_hidden_layers": 1 << 23,
    }
    begun = time.monotonic()
    for layers in (8, None):
        with pytest.raises(ArtifactRefused, match="8388608"):
            read_config(values, layers)
    assert time.monotonic() - begun < 1


def test_wishes_about_attention_are_left_out() -> None:
    wishes = {"attn_implementation": "some/kernel", "_attn_implementation": "some/kernel"}
    assert read_config({**crossed(TINY["llama"]()), **wishes}, 8)._attn_implementation is None
