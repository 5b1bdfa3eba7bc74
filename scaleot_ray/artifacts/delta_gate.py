"""What a delta must be before it leaves a data owner, and before the model owner takes it in.

A delta has exactly the tensors that its method has in the plug-in layers of the emulator it was tuned
on, and no more bytes than those layers: nothing else can travel in it.
"""

from __future__ import annotations

import torch

from scaleot_ray.artifacts.artifact import shard_names
from scaleot_ray.artifacts.emulator_gate import model_sizes
from scaleot_ray.artifacts.manifest import DeltaContent, Manifest, TensorEntry
from scaleot_ray.artifacts.raw_bytes import DTYPES, dtype_name
from scaleot_ray.artifacts.tensor_roles import emulator_content, family_named
from scaleot_ray.artifacts.untrusted import is_finite_number, quoted
from scaleot_ray.errors import ArtifactRefused
from scaleot_ray.families import Family

SETTINGS = {"layers": set(), "lora": {"rank", "alpha", "targets"}, "bottleneck": {"width", "activation"}}
ACTIVATIONS = ("gelu", "silu", "relu")

_REMEDY = "Tune again on the emulator this is meant for, and send the delta as scaleot_ray wrote it."


ANY_START = "any"
"""In place of a digest: whatever tuning began with; a delta is the whole change, so it fits all the same."""


def check_delta(manifest: Manifest, parent: Manifest | None, start: str | None = None) -> None:
    """Refuses a delta that does not belong to ``parent``, or has other tensors than its method.

    Args:
        manifest: the delta's.
        parent: the emulator's that it was tuned on.
        start: digest of the delta that tuning had to begin with, None for the emulator as it is; or
            :data:`ANY_START`.

    Raises:
        ArtifactRefused: names the tensor or setting, or the delta is larger than :func:`delta_limit`.
    """
    content = manifest.content
    assert isinstance(content, DeltaContent)  # Manifest ties content to kind
    if parent is None:
        raise ArtifactRefused("a delta cannot be checked without its emulator.", "Give the emulator's manifest.")
    emulator, family = emulator_content(parent), family_named(parent)
    if manifest.parent_digest != parent.digest():
        raise ArtifactRefused(
            f"the delta was tuned on emulator {manifest.parent_digest}, not on {parent.digest()}.", _REMEDY
        )
    if start != ANY_START and content.start != start:
        raise ArtifactRefused(
            f"tuning began with {_beginning(content.start)}, this round begins with {_beginning(start)}.", _REMEDY
        )
    if manifest.family != parent.family or manifest.model_config_json not in (None, parent.model_config_json):
        raise ArtifactRefused("the delta names another model family or config than its emulator.", _REMEDY)
    if content.method not in SETTINGS:
        raise ArtifactRefused(f"method {quoted(content.method)} is unknown (known: {', '.join(SETTINGS)}).", _REMEDY)
    if content.positions != list(emulator.plug_in_positions):
        raise ArtifactRefused(
            f"positions are {quoted(content.positions)}; the plug-in layers are {list(emulator.plug_in_positions)}.",
            _REMEDY,
        )
    keys = SETTINGS[content.method]
    if content.settings.keys() != keys:
        raise ArtifactRefused(
            f"settings of {content.method} are {quoted(sorted(content.settings))}, expected {sorted(keys)}.", _REMEDY
        )
    _check_file_names(manifest)
    expected = expected_tensors(content, parent, family)
    for name in sorted(expected.keys() - manifest.tensors.keys()):
        raise ArtifactRefused(f"tensor {name!r} is missing from the delta.", _REMEDY)
    types = {name: _delta_type(entry.dtype) for name, entry in _plug_in_entries(parent, family).items()}
    for name, entry in manifest.tensors.items():
        if name not in expected:
            raise ArtifactRefused(f"tensor {name!r} is none that a delta of method {content.method!r} has.", _REMEDY)
        if entry.shape != expected[name]:
            raise ArtifactRefused(f"tensor {name!r} has shape {entry.shape}, expected {expected[name]}.", _REMEDY)
        # Half the precision would make that of an aggregate half too. Where the tensor is none of the emulator's
        # own, which of the plug-in layers' types it was made in depends on the method.
        allowed = {types[name]} if name in types else set(types.values())
        if entry.dtype not in allowed:
            raise ArtifactRefused(
                f"tensor {name!r} has type {entry.dtype}; on this emulator it is {' or '.join(sorted(allowed))}.",
                _REMEDY,
            )
    size, limit = sum(entry.nbytes for entry in manifest.tensors.values()), delta_limit(parent)
    if size > limit:
        raise ArtifactRefused(
            f"the delta of method {content.method!r} has {size} bytes, more than the {limit} of the plug-in layers "
            "that it changes.",
            "Tune with a smaller tune.lora_rank or tune.bottleneck_width, or with tune.method=layers; send the delta "
            "as scaleot_ray wrote it.",
        )


def _check_file_names(manifest: Manifest) -> None:
    """Refuses names of tensor files that could say something: there is one way to name them."""
    files = {entry.file for entry in manifest.tensors.values()}
    for name in sorted(files - set(shard_names(len(files)))):
        raise ArtifactRefused(
            f"tensor file {name!r} is none of a delta with {len(files)} of them ('tensors.safetensors', "
            "'tensors-00001-of-00002.safetensors' …).",
            _REMEDY,
        )


def _beginning(start: str | None) -> str:
    return f"delta {start}" if start is not None else "the emulator as it is"


def delta_limit(parent: Manifest) -> int:
    """Bytes of the largest delta on the emulator ``parent``: its plug-in layers', in the type that deltas have.

    That type is fp32, or fp64 for an fp64 model.
    """
    entries = _plug_in_entries(parent, family_named(parent)).values()
    return sum(entry.parameters * DTYPES[_delta_type(entry.dtype)].itemsize for entry in entries)


def _delta_type(weights: str) -> str:
    """Type of a delta's tensor for weights of a type: fp32, or fp64 for an fp64 model."""
    return str(dtype_name(torch.promote_types(DTYPES[weights], torch.float32)))


def _plug_in_entries(parent: Manifest, family: Family) -> dict[str, TensorEntry]:
    layers = tuple(family.layer_prefix(position) for position in emulator_content(parent).plug_in_positions)
    return {name: entry for name, entry in parent.tensors.items() if name.startswith(layers)}


def expected_tensors(content: DeltaContent, parent: Manifest, family: Family) -> dict[str, list[int]]:
    """Name and shape of every tensor that a delta of this method has on the emulator ``parent``.

    Raises:
        ArtifactRefused: a setting is not what the method takes, or ``parent`` lacks a plug-in tensor.
    """
    prefixes = [family.layer_prefix(position) for position in content.positions]
    if content.method == "layers":
        return {name: entry.shape for name, entry in parent.tensors.items() if name.startswith(tuple(prefixes))}
    if content.method == "lora":
        rank, result = _whole(content, "rank"), {}
        alpha = content.settings["alpha"]
        if not is_finite_number(alpha) or alpha <= 0:
            raise ArtifactRefused(f"lora: alpha is {quoted(alpha)}, expected a number above zero.", _REMEDY)
        for path in _targets(content, family):
            for prefix in prefixes:
                out_features, in_features = _weight_shape(parent, f"{prefix}{path}.weight", family)
                result[f"{prefix}{path}.lora_A"] = [rank, in_features]
                result[f"{prefix}{path}.lora_B"] = [out_features, rank]
        return result
    width, (_, d) = _whole(content, "width"), model_sizes(parent)
    if content.settings["activation"] not in ACTIVATIONS:
        raise ArtifactRefused(
            f"bottleneck: activation is {quoted(content.settings['activation'])}, expected one of "
            f"{', '.join(ACTIVATIONS)}.",
            _REMEDY,
        )
    shapes = {"down.weight": [width, d], "down.bias": [width], "up.weight": [d, width], "up.bias": [d]}
    return {f"{prefix}bottleneck.{part}": shape for prefix in prefixes for part, shape in shapes.items()}


def _targets(content: DeltaContent, family: Family) -> list[str]:
    targets, known = content.settings["targets"], [p.path for p in (*family.attention, *family.mlp)]
    if (
        not isinstance(targets, list)
        or not targets
        or len(set(targets)) != len(targets)
        or not set(targets) <= set(known)
    ):
        raise ArtifactRefused(
            f"lora: targets are {quoted(targets)}, expected some of {', '.join(known)}, each once.", _REMEDY
        )
    return targets


def _whole(content: DeltaContent, key: str) -> int:
    value = content.settings[key]
    if not isinstance(value, int) or value < 1:
        raise ArtifactRefused(
            f"{content.method}: {key} is {quoted(value)}, expected a whole number above zero.", _REMEDY
        )
    return value


def _weight_shape(parent: Manifest, name: str, family: Family) -> tuple[int, int]:
    """(out, in) of a projection's weight in the emulator."""
    entry = parent.tensors.get(name)
    if entry is None or len(entry.shape) != 2:
        raise ArtifactRefused(f"the emulator has no matrix {name!r} to tune.", _REMEDY)
    first, second = entry.shape
    return (second, first) if family.transposed else (first, second)
