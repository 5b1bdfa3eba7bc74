"""Sizes of well-known models, from their configurations."""

from scaleot_ray.families.size import ModelSize

SIZES = {
    "135M": ModelSize(134_515_008, 3_540_672, 30, 576, 49_152),  # SmolLM2
    "1.7B": ModelSize(1_711_376_384, 67_112_960, 24, 2_048, 49_152),  # SmolLM2
    "7B": ModelSize(6_738_415_616, 202_383_360, 32, 4_096, 32_000),  # Llama 2
}
