"""GPT-2: learned positions, query, key and value in one transposed (Conv1D) matrix."""

from typing import Any

from scaleot_ray.families.family import Family, Projection, hidden_size, stacked_rows


def _query_key_value(config: Any) -> tuple[int, int, int]:
    width = hidden_size(config)
    return width, width, width


GPT2 = Family(
    name="gpt2",
    model_types=("gpt2",),
    layers_path="transformer.h",
    attention=(Projection("attn.c_attn", stacked_rows(_query_key_value)), Projection("attn.c_proj")),
    mlp=(Projection("mlp.c_fc"), Projection("mlp.c_proj")),
    transposed=True,
)
