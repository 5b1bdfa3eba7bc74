"""An emulator artefact as a model that runs: what a data owner tunes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from scaleot_ray.artifacts import Artifact
from scaleot_ray.artifacts.manifest import EmulatorContent, Manifest
from scaleot_ray.emulator.harmonizer import DroppedLayer, Harmonizer
from scaleot_ray.emulator.layer_map import LayerRole
from scaleot_ray.emulator.rank_compression import LowRankLinear
from scaleot_ray.errors import ArtifactRefused
from scaleot_ray.families import Family, family_of, hidden_size
from scaleot_ray.families.config_fields import read_config
from scaleot_ray.families.loading import empty_model


def emulator_content(manifest: Manifest) -> EmulatorContent:
    """What an emulator's manifest says about it.

    Raises:
        ArtifactRefused: the artefact is of another kind.
    """
    if not isinstance(manifest.content, EmulatorContent):
        raise ArtifactRefused(
            f"the artefact is of kind {manifest.kind!r}; an emulator was expected.",
            "Give the folder that the model owner's build wrote.",
        )
    return manifest.content


def emulator_config(manifest: Manifest) -> Any:
    """The Hugging Face config of the model that the emulator stands for.

    How attention is computed is the receiver's business; a sender's wish could name code to be fetched.

    Raises:
        ArtifactRefused: the artefact is no emulator, or its config is not that of its layers.
    """
    return read_config(manifest.model_config_json, len(emulator_content(manifest).layer_map))


def assemble(artifact: Artifact, device: torch.device | str = "cpu") -> Any:
    """The emulator as a Hugging Face causal LM with replaced, compressed and dropped layers in place.

    Parameters take over the artefact's tensors as they are, without a copy on the same device: who
    trains some of them copies those first. No parameter requires a gradient; the model is in
    evaluation mode.

    Raises:
        ArtifactRefused: the artefact is no emulator, or its tensors do not make a whole model.
    """
    content, config = emulator_content(artifact.manifest), emulator_config(artifact.manifest)
    dtype = getattr(torch, artifact.manifest.dtype or "float32")
    return assemble_tensors(config, content, artifact.tensors, dtype, device)


def assemble_tensors(
    config: Any,
    content: EmulatorContent,
    tensors: dict[str, torch.Tensor],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> Any:
    """:func:`assemble`, from the parts of an artefact."""
    model = unfilled_emulator(config, content, tensors, dtype)
    try:
        unexpected = model.load_state_dict(
            {name: tensor.to(device) for name, tensor in tensors.items()}, strict=False, assign=True
        ).unexpected_keys
    except RuntimeError as error:
        raise ArtifactRefused(
            f"the emulator's tensors do not fit its model: {error}.", "Ask the model owner for the emulator again."
        ) from None
    model.tie_weights()
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise _missing(missing[0])
    if unexpected:
        raise ArtifactRefused(
            f"tensor {unexpected[0]!r} is not part of the emulator.", "Ask the model owner for the emulator again."
        )
    model.to(device)
    return model.requires_grad_(False).eval()


def unfilled_emulator(
    config: Any, content: EmulatorContent, tensors: dict[str, torch.Tensor], dtype: torch.dtype
) -> Any:
    """What :func:`assemble` fills: all layers in place, their parameters on the meta device and not tied.

    Args:
        tensors: of a compressed projection, only the shapes of its factors count.

    Raises:
        ArtifactRefused: layers and factors do not make a model of this config.
    """
    family = family_of(config)
    model = empty_model(config, dtype)
    layers = family.layers(model)
    if len(layers) != len(content.layer_map):
        raise ArtifactRefused(
            f"manifest: layer_map has {len(content.layer_map)} entries, the model has {len(layers)} layers.",
            "Ask the model owner for the emulator again.",
        )
    for index, role in enumerate(content.layer_map):
        if LayerRole(role) is LayerRole.DROPPED:
            layers[index] = DroppedLayer(family.returns_tuple)
        elif LayerRole(role) is LayerRole.REPLACED:
            spec = content.harmonizer
            assert spec is not None  # the manifest's own check
            with torch.device("meta"):
                layers[index] = Harmonizer(hidden_size(config), spec.rank, spec.activation, family.returns_tuple)
        elif LayerRole(role) is LayerRole.KEPT:
            _place_factors(layers[index], family, family.layer_prefix(index), config, tensors)
    return model


def _place_factors(
    layer: nn.Module, family: Family, prefix: str, config: Any, tensors: dict[str, torch.Tensor]
) -> None:
    for projection in family.attention:
        name = prefix + projection.path
        if name + ".down" not in tensors:
            continue
        rows = projection.parts(config) if projection.parts else None
        names = [f"{name}.up.{part}" for part in range(1 if rows is None else len(rows))]
        for up in names:
            if up not in tensors:
                raise _missing(up)
        ups = [tensors[up] for up in names]
        sizes, ranks = [up.shape[0] for up in ups], [up.shape[1] for up in ups]
        width = tensors[name + ".down"].shape[1]
        module = LowRankLinear(width, sizes, ranks, name + ".bias" in tensors, rows).to("meta")
        parent, _, attribute = projection.path.rpartition(".")
        setattr(layer.get_submodule(parent), attribute, module)


def _missing(name: str) -> ArtifactRefused:
    return ArtifactRefused(
        f"tensor {name!r} is missing from the emulator.", "Ask the model owner for the emulator again."
    )
