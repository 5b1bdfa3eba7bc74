"""OPT: learned positions, biases everywhere, separate query, key and value; norms before or (350M) after."""

from scaleot_ray.families.family import Family, Projection

OPT = Family(
    name="opt",
    model_types=("opt",),
    layers_path="model.decoder.layers",
    attention=tuple(Projection(f"self_attn.{name}") for name in ("q_proj", "k_proj", "v_proj", "out_proj")),
    mlp=(Projection("fc1"), Projection("fc2")),
)
