"""A delta into the full model, written as a checkpoint or a PEFT adapter: the model owner's last step."""

from __future__ import annotations

from pathlib import Path

from scaleot_ray.artifacts.artifact import Artifact
from scaleot_ray.artifacts.gate import check_crossing
from scaleot_ray.artifacts.manifest import Manifest
from scaleot_ray.emulator.assemble import emulator_content
from scaleot_ray.errors import ConfigError
from scaleot_ray.families.loading import BaseModel
from scaleot_ray.plugin import export_checkpoint, export_peft
from scaleot_ray.tuning import from_artifact


def plug_in(
    base: BaseModel,
    delta: Artifact,
    emulator: Manifest,
    output: Path,
    *,
    scale: float = 1.0,
    adapter: bool = False,
    overwrite: bool = False,
) -> Path:
    """Writes the full model with a delta in it.

    Args:
        base: the full model the emulator was built from.
        delta: what a data owner sent; it passes the gate once more.
        emulator: manifest of the emulator it was tuned on.
        output: folder of the checkpoint, or of the adapter.
        scale: λ, factor on the delta.
        adapter: write a standard PEFT adapter instead of a merged checkpoint (method lora only).
        overwrite: replace an earlier export in ``output``.

    Raises:
        ArtifactRefused: the delta belongs to another emulator, or its tensors are not what they must be.
        ConfigError: the model is not the one that the emulator was built from; the method cannot be
            written in this form; ``output`` exists.
        ResourcesMissing: the disk is full; nothing is left behind.
    """
    check_crossing(delta, parent=emulator)
    check_same_model(base, emulator)
    if adapter:
        return export_peft(
            from_artifact(delta), base.model.config, output, base=base.name, scale=scale, overwrite=overwrite
        )
    return export_checkpoint(base, from_artifact(delta), output, scale=scale, overwrite=overwrite)


def check_same_model(base: BaseModel, emulator: Manifest) -> None:
    """Refuses a full model that the emulator was not built from.

    Raises:
        ConfigError: weights, types or config differ.
    """
    expected, found = emulator_content(emulator).base_digest, base.digest
    if found != expected:
        raise ConfigError(
            f"model.path: {base.source} is not the model the emulator was built from "
            f"(digest {found[:12]}…, the emulator says {expected[:12]}…).",
            "Give the same weights, loaded as the same model.dtype.",
        )
