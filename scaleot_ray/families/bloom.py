"""BLOOM: ALiBi positions, query, key and value fused head by head; its layers return tuples."""

from scaleot_ray.families.family import Family, Projection, rows_by_head

BLOOM = Family(
    name="bloom",
    model_types=("bloom",),
    layers_path="transformer.h",
    attention=(Projection("self_attention.query_key_value", rows_by_head), Projection("self_attention.dense")),
    mlp=(Projection("mlp.dense_h_to_4h"), Projection("mlp.dense_4h_to_h")),
    returns_tuple=True,
)
