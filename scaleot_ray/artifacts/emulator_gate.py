"""What an emulator must be before it leaves the model owner."""

from __future__ import annotations

from collections import defaultdict

from scaleot_ray.artifacts.manifest import EmulatorContent, Manifest
from scaleot_ray.artifacts.tensor_roles import HARMONIZER_TENSORS, TensorRole, emulator_content, tensor_roles
from scaleot_ray.errors import ArtifactRefused
from scaleot_ray.families import hidden_size, layer_count
from scaleot_ray.families.config_fields import read_config

_REBUILD = "Build the emulator again with scaleot_ray; manifests are not edited by hand."


def check_emulator(manifest: Manifest) -> None:
    """Refuses an emulator that hides nothing, or reveals more than its manifest says.

    What is replaced or dropped, and what leaves verbatim, is told from the tensors' names.

    Raises:
        ArtifactRefused: names the layer or tensor.
    """
    content, roles = emulator_content(manifest), tensor_roles(manifest)
    hidden = content.layer_map.count("replaced") + content.layer_map.count("dropped")
    if not content.protected or not hidden:
        what = "no layer is replaced or dropped" if not hidden else "it was built unprotected"
        raise ArtifactRefused(
            f"the emulator hides nothing ({what}): sending it would hand over the model.",
            "Build it with a higher alpha (emulator.alpha) and without allow_unprotected.",
        )
    _, width = model_sizes(manifest)
    for name, entry in manifest.tensors.items():
        if not entry.parameters:
            raise ArtifactRefused(f"tensor {name!r} is empty (shape {entry.shape}).", "Gather weights before saving.")
    _check_layers(manifest, content, roles, width)
    verbatim = sum(manifest.tensors[name].parameters for name, role in roles.items() if role.verbatim)
    if verbatim > content.verbatim_parameters:
        raise ArtifactRefused(
            f"{verbatim} of the owner's parameters would leave verbatim; "
            f"the manifest says {content.verbatim_parameters}.",
            _REBUILD,
        )


def model_sizes(manifest: Manifest) -> tuple[int, int]:
    """Decoder layers n and width d of the model whose config a manifest carries.

    Raises:
        ArtifactRefused: it carries none, one that cannot be read, or one that an emulator's layer map contradicts.
    """
    content = manifest.content
    layers = len(content.layer_map) if isinstance(content, EmulatorContent) else None
    config = read_config(manifest.model_config_json, layers)
    return layer_count(config), hidden_size(config)


def _check_layers(manifest: Manifest, content: EmulatorContent, roles: dict[str, TensorRole], width: int) -> None:
    inside: dict[int, dict[str, str]] = defaultdict(dict)
    for tensor, role in roles.items():
        if role.layer is None:
            continue
        if role.role in ("replaced", "dropped") and role.part != "harmonizer":
            raise ArtifactRefused(
                f"tensor {tensor!r} is layer {role.layer}'s own, which the layer map calls {role.role}.", _REBUILD
            )
        inside[role.layer][role.name] = tensor
    for layer, kind in enumerate(content.layer_map):
        if kind == "replaced":
            _check_harmonizer(
                layer, {name: manifest.tensors[tensor].shape for name, tensor in inside[layer].items()}, content, width
            )
        elif kind in ("plug_in", "kept") and not inside[layer]:
            raise ArtifactRefused(f"layer {layer} is {kind} by the layer map, but has no tensors.", _REBUILD)


def _check_harmonizer(layer: int, found: dict[str, list[int]], content: EmulatorContent, width: int) -> None:
    assert content.harmonizer is not None  # EmulatorContent ties it to replaced layers
    rank = content.harmonizer.rank
    shapes = dict(zip(HARMONIZER_TENSORS, ([rank, width], [rank], [width, rank], [width]), strict=True))
    for name, shape in shapes.items():
        if found.get(name) != shape:
            raise ArtifactRefused(
                f"layer {layer}: harmonizer tensor {name!r} has shape {found.get(name)}, expected {shape}.", _REBUILD
            )
