"""Phi-3: Llama-like, with query, key and value in one matrix and gate and up in another."""

from typing import Any

from scaleot_ray.families.family import Family, Projection, head_size, stacked_rows


def _query_key_value(config: Any) -> tuple[int, int, int]:
    size = head_size(config)
    keys = int(config.num_key_value_heads) * size
    return int(config.num_attention_heads) * size, keys, keys


def _gate_up(config: Any) -> tuple[int, int]:
    return int(config.intermediate_size), int(config.intermediate_size)


PHI3 = Family(
    name="phi3",
    model_types=("phi3",),
    layers_path="model.layers",
    attention=(Projection("self_attn.qkv_proj", stacked_rows(_query_key_value)), Projection("self_attn.o_proj")),
    mlp=(Projection("mlp.gate_up_proj", stacked_rows(_gate_up)), Projection("mlp.down_proj")),
)
