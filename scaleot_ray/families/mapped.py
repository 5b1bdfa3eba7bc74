"""Base models whose weights stay in their files: pages that are read where they are needed and never copied."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from scaleot_ray.config import ModelSettings
from scaleot_ray.errors import ConfigError
from scaleot_ray.families.loading import BaseModel, load_base_model
from scaleot_ray.families.sources import resolve_source

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Types by their names in the safetensors format."""


def map_base_model(settings: ModelSettings) -> BaseModel:
    """The model on the CPU, as :func:`~scaleot_ray.families.loading.load_base_model` gives it, in next to no memory.

    transformers maps safetensors files into memory and keeps what has the type that is asked for as it is, so that
    the system can take back its pages at any time; what has another type is converted, which is a copy.

    Raises:
        ConfigError: ``model.path`` leads to no directory, most of its weights are of another type than
            ``model.dtype``, or :func:`~scaleot_ray.families.loading.load_base_model` refuses it.
        UnsupportedArchitectureError: no family knows the architecture.
    """
    source = resolve_source(settings.path, "model.path", ("config.json", "*.safetensors"))
    if source.is_file():
        raise ConfigError(
            f"model.path: {source} is a GGUF file, whose weights have to be unpacked into memory.",
            "Give the model's Hugging Face directory, or build without --stream.",
        )
    stored = stored_dtype(source)
    if stored is not None and stored != settings.dtype:
        raise ConfigError(
            f"model.dtype: {settings.dtype} is asked for, but the weights of {source} are {stored}; a streamed build "
            "leaves them as they are.",
            f"Give --dtype {stored} (model.dtype), to build, eval and plug alike.",
        )
    return load_base_model(settings.model_copy(update={"device": "cpu"}))


def stored_dtype(directory: Path) -> str | None:
    """The type that most of the weights have; None where nothing can be read, which loading says more of."""
    sizes: Counter[str] = Counter()
    try:
        for path in directory.glob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (no mapping)
                    part = file.get_slice(name)
                    sizes[part.get_dtype()] += torch.Size(part.get_shape()).numel()
    except (OSError, SafetensorError):
        return None
    most = max(sizes, key=sizes.__getitem__, default="")
    return _DTYPES.get(most)
