"""What each tensor of an emulator is, told from its name and the layer map alone.

The owner's own tensors keep their Hugging Face parameter names; ``<projection>.down`` and
``<projection>.up.0`` … are the factors of a compressed one; a replaced layer has its harmonizer's
``down.weight``, ``down.bias``, ``up.weight`` and ``up.bias``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from scaleot_ray.artifacts.manifest import EmulatorContent, Manifest
from scaleot_ray.errors import ArtifactRefused
from scaleot_ray.families import FAMILIES, Family

HARMONIZER_TENSORS = ("down.weight", "down.bias", "up.weight", "up.bias")

_FACTOR = re.compile(r"(?P<path>.+)\.(down|up\.\d+)")


@dataclass(frozen=True)
class TensorRole:
    """What a tensor of an emulator is.

    Attributes:
        layer: index of its decoder layer; None for embeddings, head and final norm.
        role: the layer's role in the layer map, or ``outside``.
        part: ``raw`` (the owner's own numbers), ``product`` (an attention weight that was cut in rank
            and is stored as one matrix, or raw where the cut leaves it whole), ``factor`` or ``harmonizer``.
        name: its name inside the layer, or the whole name.
    """

    layer: int | None
    role: str
    part: Literal["raw", "product", "factor", "harmonizer"]
    name: str

    @property
    def verbatim(self) -> bool:
        """Whether these are certainly the owner's own numbers."""
        return self.part == "raw"


def family_named(manifest: Manifest) -> Family:
    """The family a manifest names.

    Raises:
        ArtifactRefused: this library has no family of that name.
    """
    for family in FAMILIES:
        if family.name == manifest.family:
            return family
    raise ArtifactRefused(
        f"family {manifest.family!r} is unknown (known: {', '.join(family.name for family in FAMILIES)}).",
        "Upgrade scaleot_ray, or ask the sender which version wrote the artefact.",
    )


def emulator_content(manifest: Manifest) -> EmulatorContent:
    """The content of an emulator's manifest.

    Raises:
        ArtifactRefused: the manifest is of another kind.
    """
    if not isinstance(manifest.content, EmulatorContent):
        raise ArtifactRefused(
            f"expected an emulator, found an artefact of kind {manifest.kind!r}.", "Give the emulator's directory."
        )
    return manifest.content


def tensor_roles(manifest: Manifest) -> dict[str, TensorRole]:
    """Role of every tensor of an emulator.

    Raises:
        ArtifactRefused: no emulator, an unknown family, or a tensor of a layer beyond the layer map.
    """
    content, family = emulator_content(manifest), family_named(manifest)
    in_layer = re.compile(re.escape(family.layers_path) + r"\.(?P<layer>\d+)\.(?P<name>.+)")
    attention = {projection.path for projection in family.attention}
    projections = attention | {projection.path for projection in family.mlp}
    roles = {}
    for tensor in manifest.tensors:
        match = in_layer.fullmatch(tensor)
        if match is None:
            roles[tensor] = TensorRole(None, "outside", "raw", tensor)
            continue
        layer, name = int(match["layer"]), match["name"]
        if layer >= len(content.layer_map):
            raise ArtifactRefused(
                f"tensor {tensor!r} belongs to layer {layer}; layer_map has {len(content.layer_map)} layers.",
                "Build the emulator again.",
            )
        role, factor = content.layer_map[layer], _FACTOR.fullmatch(name)
        part: Literal["raw", "product", "factor", "harmonizer"] = "raw"
        if role == "replaced" and name in HARMONIZER_TENSORS:
            part = "harmonizer"
        elif role == "kept" and factor and factor["path"] in projections:
            part = "factor"
        elif role == "kept" and content.beta > 0 and name.removesuffix(".weight") in attention:
            part = "product"
        roles[tensor] = TensorRole(layer, role, part, name)
    return roles
