"""A plugged-in model for other programs: a merged Hugging Face checkpoint, or a PEFT adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from scaleot_ray.artifacts.atomic import atomic_directory, check_replaceable
from scaleot_ray.checkpoints import as_os_error
from scaleot_ray.errors import ConfigError
from scaleot_ray.families import family_of
from scaleot_ray.families.loading import BaseModel, empty_model, tokenizer_files
from scaleot_ray.plugin.merge import check_mergeable, merged_weights
from scaleot_ray.plugin.plug import check_fits
from scaleot_ray.tuning.delta import Delta
from scaleot_ray.tuning.lora import peft_config, target_modules

EXPORT_FILE = "scaleot_export.json"
"""Lies in every export: a folder without it may be somebody's model and is never replaced."""


def check_form(method: str, adapter: bool) -> None:
    """Refuses a delta that cannot be written in this form, before the model is there.

    Args:
        method: of the delta.
        adapter: a PEFT adapter instead of a merged checkpoint.

    Raises:
        ConfigError: names the method.
    """
    if not adapter:
        check_mergeable(method)
    elif method != "lora":
        raise ConfigError(
            f"A PEFT adapter holds low-rank pairs, but the delta's method is {method!r}.",
            "Write a merged checkpoint instead (method layers), keep the delta plugged at run time (bottleneck), "
            "or tune with the method lora.",
        )


def check_place(directory: str | Path, overwrite: bool, inputs: Mapping[str, str | Path] | None = None) -> None:
    """Refuses a folder that an export would not be written to, before the model is there.

    Args:
        directory: of the export.
        overwrite: replace an earlier export there.
        inputs: what the export is made from, by the setting that names it; what is no path here does not matter.

    Raises:
        ConfigError: it is there already and ``overwrite`` is off, it is no earlier export, or it is, holds or lies
            in an input.
    """
    target = Path(directory).expanduser().resolve()
    for key, place in (inputs or {}).items():
        path = Path(place).expanduser()
        source = path.resolve()
        if path.exists() and (target == source or target in source.parents or source in target.parents):
            raise ConfigError(
                f"output: {target} and {key} ({source}) are the same folder, or one lies in the other.",
                "Choose a folder of its own for the result.",
            )
    check_replaceable(target, EXPORT_FILE, overwrite)


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
    check_place(directory, overwrite)
    merged = merged_weights(base.model, base.family, delta, scale)
    needed = sum(parameter.nbytes for parameter in base.model.parameters())
    with atomic_directory(directory, needed, EXPORT_FILE, overwrite) as partial:
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
        _mark(partial, "checkpoint", delta, scale)
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
    check_form(delta.method, adapter=True)
    check_place(directory, overwrite)
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
    with atomic_directory(directory, needed, EXPORT_FILE, overwrite) as partial:
        settings.save_pretrained(str(partial))
        try:
            save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
        except SafetensorError as error:
            raise as_os_error(error) from error
        _mark(partial, "peft_adapter", delta, scale)
    return Path(directory)


def _mark(directory: Path, form: str, delta: Delta, scale: float) -> None:
    values = {"form": form, "method": delta.method, "scale": scale}
    (directory / EXPORT_FILE).write_text(json.dumps(values, indent=2) + "\n")
