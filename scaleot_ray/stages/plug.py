"""A delta into the full model, written as a checkpoint or a PEFT adapter: the model owner's last step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from scaleot_ray.artifacts.artifact import Artifact
from scaleot_ray.artifacts.delta_gate import ANY_START
from scaleot_ray.artifacts.gate import check_crossing
from scaleot_ray.artifacts.manifest import Manifest
from scaleot_ray.data.encoding import Encoder
from scaleot_ray.emulator.assemble import emulator_content
from scaleot_ray.errors import ConfigError
from scaleot_ray.families.loading import BaseModel, load_tokenizer, tokenizer_files
from scaleot_ray.plugin import export_checkpoint, export_peft
from scaleot_ray.tuning import from_artifact


def plug_in(
    base: BaseModel,
    delta: Artifact,
    emulator: Manifest,
    output: Path,
    *,
    emulator_files: Mapping[str, bytes],
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
        emulator_files: the emulator's files, its tokenizer among them.
        scale: λ, factor on the delta.
        adapter: write a standard PEFT adapter instead of a merged checkpoint (method lora only).
        overwrite: replace an earlier export in ``output``.

    Raises:
        ArtifactRefused: the delta belongs to another emulator, or its tensors are not what they must be; the
            emulator's tokenizer cannot be read.
        ConfigError: model or tokenizer are not those that the emulator was built from; the method cannot be
            written in this form; ``output`` exists.
        ResourcesMissing: the disk is full; nothing is left behind.
    """
    check_crossing(delta, parent=emulator, start=ANY_START)
    check_same_model(base, emulator)
    check_same_tokenizer(base, emulator_files)
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


def check_same_tokenizer(base: BaseModel, files: Mapping[str, bytes], chat: bool = False) -> None:
    """Refuses a tokenizer that gives a text other token ids than the emulator's, with which the delta was tuned.

    Args:
        base: the full model with its tokenizer.
        files: the emulator's.
        chat: also compare the chat templates, which only chat rows go through.

    Raises:
        ConfigError: the tokenizers' rules differ.
        ArtifactRefused: the emulator has no tokenizer, or one that cannot be read.
    """
    own = tokenizer_files(base.tokenizer)
    if all(files.get(name) == data for name, data in own.items()):
        return
    # Both are read back from files, by one version of one library: what differs then is what they say.
    expected, found = load_tokenizer(dict(files)), load_tokenizer(own)
    rules = Encoder(found).rules()
    different = [rule for rule, value in Encoder(expected).rules().items() if rules[rule] != value]
    if chat and found.chat_template != expected.chat_template:
        different.append("chat_template")
    if different:
        raise ConfigError(
            f"model.tokenizer: the tokenizer given for {base.source} is not the emulator's: "
            f"{', '.join(different)} {'differs' if len(different) == 1 else 'differ'}, so a text would become "
            "other tokens than it did in tuning.",
            "Leave model.tokenizer as it was for the build, or set it to the emulator's folder, which holds it.",
        )
