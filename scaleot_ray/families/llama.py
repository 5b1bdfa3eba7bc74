"""Llama-like decoders: Llama, SmolLM, SmolLM3, Mistral, Qwen2, Qwen3, Gemma 2, Gemma 3."""

from scaleot_ray.families.family import Family, Projection

LLAMA = Family(
    name="llama",
    model_types=("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "smollm3"),
    layers_path="model.layers",
    attention=tuple(Projection(f"self_attn.{name}") for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    mlp=tuple(Projection(f"mlp.{name}") for name in ("gate_proj", "up_proj", "down_proj")),
    normed_attention=("gemma2", "gemma3_text"),
)
