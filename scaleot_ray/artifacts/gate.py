"""The gate: the one place that everything goes through before it crosses between parties.

Only what is on a closed list crosses, and no flag of a manifest is trusted that the tensors can tell:
see :mod:`~scaleot_ray.artifacts.emulator_gate` and :mod:`~scaleot_ray.artifacts.delta_gate`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from scaleot_ray import __version__
from scaleot_ray.artifacts.artifact import Artifact
from scaleot_ray.artifacts.card import CARD_FILE, CARD_LIMIT, model_card
from scaleot_ray.artifacts.delta_gate import check_delta
from scaleot_ray.artifacts.emulator_gate import check_emulator
from scaleot_ray.artifacts.manifest import Manifest, MetricsContent
from scaleot_ray.artifacts.manifest_json import parse_sent, render_manifest
from scaleot_ray.artifacts.untrusted import quoted
from scaleot_ray.errors import ArtifactRefused

METRICS = tuple(
    f"{model}{measure}"
    for model in ("emulator_zero_shot", "emulator_tuned")
    for measure in ("", ".normalised", ".log_likelihood", ".log_probability")
)
"""Names of all numbers that a data owner may send; free names could say something about its rows."""
FILES_LIMIT = 256 << 20
"""Bytes of all files together that are no tensors; the largest tokenizers have about 40 MB."""

# A tokenizer's files and licence texts: JSON and text, nothing that a loader would execute or unpickle.
_EMULATOR_FILE = re.compile(r"([\w.+-]+/)*([\w.+-]+\.(json|txt|md|jinja|model)|LICEN[CS]E|NOTICE)")
_LEAVE_OUT = "Leave it out; send metrics as scaleot_ray wrote them."


def check_crossing(artifact: Artifact, *, parent: Manifest | None = None, start: str | None = None) -> None:
    """Lets an artefact pass, or says why it must not cross.

    Args:
        artifact: what is to cross, in either direction.
        parent: the emulator's manifest; deltas and metrics are checked against it. Metrics pass without
            one only if they name no model, licence or parent.
        start: digest of the delta that a delta's tuning had to begin with; None for the emulator as it is,
            :data:`~scaleot_ray.artifacts.delta_gate.ANY_START` for any.

    Raises:
        ArtifactRefused: it is of no known kind, not what its manifest says, holds files its kind does not
            have or a card of its own wording, an emulator that hides nothing, a delta of another parent,
            with tensors that its method does not have or larger than the layers it changes, or metrics
            that are no plain numbers or of other names than :data:`METRICS`.
    """
    # Read back as the receiver will: a manifest put together in memory may have skipped its own checks.
    manifest = parse_sent(render_manifest(artifact.manifest), artifact.manifest.kind)
    check_manifest(manifest, parent=parent, start=start)
    if manifest.kind != "emulator":
        _check_card(manifest, artifact.files)
    artifact.verify()


def check_manifest(manifest: Manifest, *, parent: Manifest | None = None, start: str | None = None) -> None:
    """What :func:`check_crossing` can tell from the manifest alone, before tensors and files are read.

    What passes may be read into memory: a delta has no more bytes than the layers it changes, and files
    are small. Only an emulator's tensors may have any size.

    Args:
        manifest: as it was parsed.
        parent, start: as of :func:`check_crossing`.

    Raises:
        ArtifactRefused: as :func:`check_crossing`.
    """
    _check_files(manifest)
    if manifest.kind == "emulator":
        check_emulator(manifest)
    elif manifest.kind == "delta":
        check_delta(manifest, parent, start)
    else:
        _check_metrics(manifest, parent)
    if manifest.kind != "emulator":
        _check_base(manifest, parent)


def _check_files(manifest: Manifest) -> None:
    for name, entry in manifest.files.items():
        allowed = _EMULATOR_FILE.fullmatch(name) if manifest.kind == "emulator" else name == CARD_FILE
        if not allowed:
            raise ArtifactRefused(
                f"file {name!r} does not belong to an artefact of kind {manifest.kind!r}.",
                f"Leave it out; such an artefact has a {CARD_FILE} and no other file."
                if manifest.kind != "emulator"
                else "Leave it out; an emulator carries its card, licences and the tokenizer's JSON and text files.",
            )
        if name == CARD_FILE and entry.bytes > CARD_LIMIT:
            raise ArtifactRefused(
                f"file {name!r} has {entry.bytes} bytes; a card has at most {CARD_LIMIT}.", "Shorten the card."
            )
    size = sum(entry.bytes for entry in manifest.files.values())
    if size > FILES_LIMIT:
        raise ArtifactRefused(
            f"its files (no tensors) have {size} bytes, more than the {FILES_LIMIT} they may have together.",
            "Leave out what is no tokenizer, licence or card.",
        )


def _check_base(manifest: Manifest, parent: Manifest | None) -> None:
    """What a data owner sends names the base model and licence as the emulator did: they are no place for its words."""
    for field in ("base_model", "licence"):
        if getattr(manifest, field) != (getattr(parent, field) if parent is not None else None):
            raise ArtifactRefused(
                f"{field} of the {manifest.kind} is not what its emulator says.",
                "Send what scaleot_ray wrote when it tuned on this emulator.",
            )


def _check_card(manifest: Manifest, files: Mapping[str, bytes]) -> None:
    # The card of what a data owner sends must be the one that follows from the manifest, else private
    # text could leave in it. It is compared, not written anew on receipt: the card is on the manifest, so
    # replacing it would change the digest, and the two parties' audit logs would name different artefacts.
    if CARD_FILE in files and files[CARD_FILE] != model_card(manifest).encode():
        raise ArtifactRefused(
            f"file {CARD_FILE!r} says something else than the card of this {manifest.kind}.",
            f"It was written by scaleot_ray {manifest.library_version}, this is {__version__}: where they differ, use "
            "the same on both sides; else do not use the artefact.",
        )


def _check_metrics(manifest: Manifest, parent: Manifest | None) -> None:
    assert isinstance(manifest.content, MetricsContent)  # Manifest ties content to kind
    # Fields that other kinds need; here they could only carry something else.
    expected = (parent.digest(), parent.family) if parent is not None else (None, None)
    if manifest.parent_digest not in (None, expected[0]):
        raise ArtifactRefused("the metrics belong to another emulator.", "Send what was measured on this emulator.")
    if manifest.family not in (None, expected[1]) or manifest.model_config_json is not None:
        raise ArtifactRefused("metrics carry no model config, and no other family than their emulator's.", _LEAVE_OUT)
    if manifest.tensors:
        raise ArtifactRefused(
            f"tensor {min(manifest.tensors)!r}: metrics carry no tensors.", "Send tensors as a delta, or not at all."
        )
    for name in manifest.content.values:
        if name not in METRICS:
            raise ArtifactRefused(f"metric name {quoted(name)} is not allowed.", f"Send only {', '.join(METRICS)}.")
