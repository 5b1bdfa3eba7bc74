"""GPT-NeoX and Pythia: residual branches parallel or in sequence; query, key and value fused head by head."""

from scaleot_ray.families.family import Family, Projection, rows_by_head

NEOX = Family(
    name="neox",
    model_types=("gpt_neox",),
    layers_path="gpt_neox.layers",
    attention=(Projection("attention.query_key_value", rows_by_head), Projection("attention.dense")),
    mlp=(Projection("mlp.dense_h_to_4h"), Projection("mlp.dense_4h_to_h")),
)
