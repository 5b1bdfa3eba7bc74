"""What a model allows: tokens in a sequence, token ids, the size of a delta."""

from __future__ import annotations

import math
from typing import Any

from scaleot_ray.artifacts.delta_gate import expected_tensors
from scaleot_ray.artifacts.manifest import DeltaContent, Manifest
from scaleot_ray.config import TuneSettings
from scaleot_ray.emulator.assemble import emulator_content
from scaleot_ray.errors import ConfigError
from scaleot_ray.families import Family
from scaleot_ray.families.family import context_length
from scaleot_ray.tuning import method_named

_SIZES = {"lora": "lora_rank", "bottleneck": "bottleneck_width"}


def check_block_size(config: Any, block_size: int, key: str) -> None:
    """Refuses sequences longer than the model's context.

    Args:
        config: the model's Hugging Face config.
        block_size: tokens per sequence.
        key: the setting it comes from, for the message.

    Raises:
        ConfigError: the context is shorter.
    """
    check_context(context_length(config), block_size, key)


def check_context(context: int | None, block_size: int, key: str) -> None:
    """The same for a context that is known already; None is one without bound.

    Raises:
        ConfigError: the context is shorter.
    """
    if context is not None and block_size > context:
        raise ConfigError(
            f"{key}: {block_size} tokens per sequence, but the model's context has {context}.",
            f"Set {key} to {context} or less.",
        )


def vocabulary_size(model: Any) -> int:
    """Token ids the model has an embedding for."""
    return int(model.get_input_embeddings().weight.shape[0])


def check_delta_size(emulator: Manifest, family: Family, tune: TuneSettings) -> None:
    """Refuses, before hours of tuning, a delta that the gate would not let pass: larger than the layers it changes.

    Raises:
        ConfigError: it would be; names the key to lower.
    """
    positions = list(emulator_content(emulator).plug_in_positions)

    def parameters(method: str) -> int:
        content = DeltaContent(method=method, positions=positions, settings=method_named(method).settings(tune, family))
        return sum(map(math.prod, expected_tensors(content, emulator, family).values()))

    count, limit = parameters(tune.method), parameters("layers")
    if count > limit:
        key = _SIZES[tune.method]
        raise ConfigError(
            f"tune.{key}: with {getattr(tune, key)} a delta of method {tune.method} has {count} parameters, more than "
            f"the {limit} of the plug-in layers that it changes.",
            f"Lower tune.{key}, or tune whole layers with tune.method=layers.",
        )
