"""A plugged-in model for other programs: a merged Hugging Face checkpoint, or a PEFT adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from scaleot_ray.artifacts.atomic import atomic_directory
from scaleot_ray.checkpoints import as_os_error
from scaleot_ray.errors import ConfigError
from scaleot_ray.families import family_of
from scaleot_ray.families.loading import BaseModel, empty_model, tokenizer_files
from scaleot_ray.plugin.merge import merged_weights
from scaleot_ray.plugin.plug import check_fits
from scaleot_ray.tuning.delta import Delta
from scaleot_ray.tuning.lora import peft_config, target_modules


def export_checkpoint(
    base: BaseModel, delta: Delta, directory: str | Path, *, scale: float = 1.0, overwrite: bool = False
) -> Path:
    """Writes the base model with ``delta`` merged as a Hugging Face checkpoint, whole or not at all.

    ``AutoModelForCausalLM.from_pretrained(directory, dtype="auto")`` loads it; tied heads stay tied and
    the tokenizer lies beside the weights. The base model in memory stays as it is.

    Args:
        directory: new folder; with ``overwrite`` one that holds an earlier export is replaced.
        scale: λ, as for :func:`~scaleot_ray.plugin.plug.plug`.

    Raises:
        ArtifactRefused: the delta does not fit the model; names the tensor.
        ConfigError: the delta is a ``bottleneck``, the model has a delta in it, or the folder exists.
        ResourcesMissing: the disk is full; nothing is left behind.
    """
    merged = merged_weights(base.model, base.family, delta, scale)
    needed = sum(parameter.nbytes for parameter in base.model.parameters())
    with atomic_directory(directory, needed, "config.json", overwrite) as partial:
        try:
            base.model.save_pretrained(partial, state_dict={**base.model.state_dict(), **merged})
        except SafetensorError as error:
            raise as_os_error(error) from error
        for name, data in tokenizer_files(base.tokenizer).items():
            (partial / name).write_bytes(data)
        # The model was loaded without a cache to train and score it; whoever generates wants one.
        config = partial / "config.json"
        values = json.loads(config.read_text())
        values.pop("use_cache", None)
        config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    return Path(directory)


def export_peft(
    delta: Delta,
    config: Any,
    directory: str | Path,
    *,
    base: str | None = None,
    scale: float = 1.0,
    overwrite: bool = False,
) -> Path:
    """Writes a ``lora`` delta as a standard PEFT adapter, whole or not at all.

    ``PeftModel.from_pretrained(base_model, directory)`` gives the same logits as plugging it in.

    Args:
        config: Hugging Face config of the base model; its weights are not needed.
        directory: new folder; with ``overwrite`` one that holds an earlier export is replaced.
        base: name of the base model for the adapter's card, e.g. its id on the hub.
        scale: λ, as for :func:`~scaleot_ray.plugin.plug.plug`.

    Raises:
        ArtifactRefused: the delta does not fit the model; names the tensor.
        ConfigError: the delta is no ``lora`` delta, or the folder exists.
        ResourcesMissing: the disk is full; nothing is left behind.
    """
    if delta.method != "lora":
        raise ConfigError(
            f"A PEFT adapter holds low-rank pairs, but the delta's method is {delta.method!r}.",
            "Write a merged checkpoint instead (method layers), keep the delta plugged at run time (bottleneck), "
            "or tune with the method lora.",
        )
    family = family_of(config)
    model = empty_model(config, torch.float32)
    check_fits(model, family, delta, scale)
    settings = peft_config(model, target_modules(family, delta.positions, delta.settings), delta.settings)
    settings.inference_mode = True
    settings.base_model_name_or_path = base
    tensors = {
        f"base_model.model.{name}.weight": (tensor.detach() * (scale if name.endswith(".lora_B") else 1.0)).cpu()
        for name, tensor in delta.tensors.items()
    }
    needed = sum(tensor.nbytes for tensor in tensors.values())
    with atomic_directory(directory, needed, "adapter_config.json", overwrite) as partial:
        settings.save_pretrained(str(partial))
        try:
            save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
        except SafetensorError as error:
            raise as_os_error(error) from error
    return Path(directory)
