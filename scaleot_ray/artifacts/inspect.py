"""What an artefact holds, as plain values and as a picture in text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from scaleot_ray.artifacts.manifest import DeltaContent, EmulatorContent, Manifest
from scaleot_ray.artifacts.tensor_roles import tensor_roles

SYMBOLS = {"plug_in": "P", "kept": "k", "replaced": "h", "dropped": "."}
LEGEND = {
    "plug_in": "plug-in, tuned by the data owner",
    "kept": "kept, frozen",
    "replaced": "replaced by a harmonizer",
    "dropped": "dropped",
}

_ROW, _GROUP = 50, 10


def describe(manifest: Manifest) -> dict[str, Any]:
    """An artefact as values that JSON takes.

    For every kind: ``kind``, ``digest``, ``parent_digest``, ``schema_version``, ``library_version``,
    ``created``, ``base_model``, ``licence``, ``family``, ``model_type``, ``dtype``, ``bytes``,
    ``tensors`` (their number), ``parameters`` and ``files`` (name to bytes). For an emulator also its
    triplet and what it reveals, with ``parameters_by_role``; for a delta ``method``, ``positions``,
    ``settings``; for metrics ``values``.

    Raises:
        ArtifactRefused: an emulator of a family that this library does not know.
    """
    result: dict[str, Any] = {
        "kind": manifest.kind,
        "digest": manifest.digest(),
        "parent_digest": manifest.parent_digest,
        "schema_version": manifest.schema_version,
        "library_version": manifest.library_version,
        "created": manifest.created,
        "base_model": manifest.base_model,
        "licence": manifest.licence,
        "family": manifest.family,
        "model_type": (manifest.model_config_json or {}).get("model_type"),
        "dtype": manifest.dtype,
        "bytes": manifest.nbytes,
        "tensors": len(manifest.tensors),
        "parameters": sum(entry.parameters for entry in manifest.tensors.values()),
        "files": {name: entry.bytes for name, entry in manifest.files.items()},
    }
    content = manifest.content
    if isinstance(content, EmulatorContent):
        return result | _emulator(manifest, content)
    if isinstance(content, DeltaContent):
        return result | {"method": content.method, "positions": content.positions, "settings": content.settings}
    return result | {"values": content.values}


def parameters_by_role(manifest: Manifest) -> dict[str, int]:
    """Parameters of an emulator by what they are.

    ``outside_layers`` (embeddings, head, final norm), ``plug_in``, ``kept`` (frozen layers as they
    are), ``kept_factors`` (their attention cut in rank) and ``harmonizers``.
    """
    counts = Counter(dict.fromkeys(("outside_layers", "plug_in", "kept", "kept_factors", "harmonizers"), 0))
    for name, role in tensor_roles(manifest).items():
        if role.part == "harmonizer":
            key = "harmonizers"
        elif role.part in ("factor", "product"):
            key = "kept_factors"
        else:
            key = {"outside": "outside_layers"}.get(role.role, role.role)
        counts[key] += manifest.tensors[name].parameters
    return dict(counts)


def layer_picture(layer_map: Sequence[str]) -> str:
    """The layers as one letter each, 50 to a line in groups of ten, with a legend below.

    At most 80 columns wide for any number of layers.
    """
    lines = []
    for start in range(0, len(layer_map), _ROW):
        row = "".join(SYMBOLS[role] for role in layer_map[start : start + _ROW])
        groups = " ".join(row[place : place + _GROUP] for place in range(0, len(row), _GROUP))
        lines.append(f"{start:>5}  {groups}")
    for role, count in sorted(Counter(layer_map).items(), key=lambda item: list(SYMBOLS).index(item[0])):
        lines.append(f"    {SYMBOLS[role]}  {count:>3} {LEGEND[role]}")
    return "\n".join(lines)


def _emulator(manifest: Manifest, content: EmulatorContent) -> dict[str, Any]:
    return {
        "plug_in_layers": content.plug_in_layers,
        "alpha": content.alpha,
        "beta": content.beta,
        "layout": content.layout,
        "builder": content.builder,
        "compression": content.compression,
        "fit_tokens": content.fit_tokens,
        "fit_steps": content.fit_steps,
        "stage_one": content.stage_one.model_dump() if content.stage_one else None,
        "harmonizer": content.harmonizer.model_dump() if content.harmonizer else None,
        "layer_map": content.layer_map,
        "layers_by_role": {role: content.layer_map.count(role) for role in SYMBOLS},
        "parameters_by_role": parameters_by_role(manifest),
        "full_parameters": content.full_parameters,
        "full_bytes": content.full_bytes,
        "verbatim_parameters": content.verbatim_parameters,
        "verbatim_share": content.verbatim_share,
        "full_loss": content.full_loss,
        "emulator_loss": content.emulator_loss,
        "loss_margin": content.loss_margin,
        "protected": content.protected,
        "base_digest": content.base_digest,
    }
