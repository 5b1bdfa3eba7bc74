"""Recomputing activations in the backward pass instead of keeping them (Chen et al., arXiv 1604.06174)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from scaleot_ray.errors import ConfigError


@contextmanager
def gradient_checkpointing(model: Any) -> Iterator[None]:
    """Inside the block the decoder layers of ``model`` keep their inputs only; loss and gradients are the same.

    Raises:
        ConfigError: the architecture does not support it.
    """
    if not model.supports_gradient_checkpointing:
        raise ConfigError(
            f"tune.gradient_checkpointing: {type(model).__name__} does not support it.", "Set it to false."
        )
    if model.is_gradient_checkpointing:
        yield
        return
    # transformers renames these methods; the new names are not in every version that we run on.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # transformers makes the embeddings' output require a gradient, for reentrant checkpointing's sake.
    # Then the backward pass would run, and activations be kept, through the frozen layers below the
    # first plug-in layer too.
    model.disable_input_require_grads()
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_disable()
