"""What a model's config allows: tokens in a sequence, token ids."""

from __future__ import annotations

from typing import Any

from scaleot_ray.errors import ConfigError
from scaleot_ray.families.family import text_config


def check_block_size(config: Any, block_size: int, key: str) -> None:
    """Refuses sequences longer than the model's context.

    Args:
        config: the model's Hugging Face config.
        block_size: tokens per sequence.
        key: the setting it comes from, for the message.

    Raises:
        ConfigError: the context is shorter.
    """
    context = getattr(text_config(config), "max_position_embeddings", None)
    if context is not None and block_size > context:
        raise ConfigError(
            f"{key}: {block_size} tokens per sequence, but the model's context has {context}.",
            f"Set {key} to {context} or less.",
        )


def vocabulary_size(model: Any) -> int:
    """Token ids the model has an embedding for."""
    return int(model.get_input_embeddings().weight.shape[0])
