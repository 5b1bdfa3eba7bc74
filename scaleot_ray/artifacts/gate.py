"""The gate: the one place that everything goes through before it crosses between parties.

Only what is on a closed list crosses, and no flag of a manifest is trusted that the tensors can tell:
see :mod:`~scaleot_ray.artifacts.emulator_gate` and :mod:`~scaleot_ray.artifacts.delta_gate`.
"""

from __future__ import annotations

import re

from scaleot_ray.artifacts.artifact import Artifact
from scaleot_ray.artifacts.delta_gate import check_delta
from scaleot_ray.artifacts.emulator_gate import check_emulator
from scaleot_ray.artifacts.manifest import Manifest, MetricsContent
from scaleot_ray.artifacts.manifest_json import parse_manifest, render_manifest
from scaleot_ray.errors import ArtifactRefused

CARD_FILE = "README.md"
CARD_LIMIT = 64 << 10
METRICS_LIMIT = 1000

# A tokenizer's files and licence texts: JSON and text, nothing that a loader would execute or unpickle.
_EMULATOR_FILE = re.compile(r"([\w.+-]+/)*([\w.+-]+\.(json|txt|md|jinja|model)|LICEN[CS]E|NOTICE)")
_METRIC_NAME = re.compile(r"[A-Za-z0-9_./ -]{1,100}")


def check_crossing(artifact: Artifact, *, parent: Manifest | None = None, max_bytes: int | None = None) -> None:
    """Lets an artefact pass, or says why it must not cross.

    Args:
        artifact: what is to cross, in either direction.
        parent: the emulator's manifest; a delta is checked against it.
        max_bytes: refuse more than this.

    Raises:
        ArtifactRefused: it is of no known kind, larger than ``max_bytes``, not what its manifest says,
            holds files its kind does not have, an emulator that hides nothing, a delta of another
            parent or with tensors that its method does not have, or metrics that are no plain numbers.
    """
    # Read back as the receiver will: a manifest put together in memory may have skipped its own checks.
    manifest = parse_manifest(render_manifest(artifact.manifest))
    if max_bytes is not None and artifact.nbytes > max_bytes:
        raise ArtifactRefused(
            f"the {manifest.kind} has {artifact.nbytes} bytes, more than the {max_bytes} that may cross.",
            "Raise the limit, or send less: a smaller emulator, a delta of lower rank.",
        )
    _check_files(manifest)
    if manifest.kind == "emulator":
        check_emulator(manifest)
    elif manifest.kind == "delta":
        check_delta(manifest, parent)
    else:
        _check_metrics(manifest)
    artifact.verify()


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


def _check_metrics(manifest: Manifest) -> None:
    assert isinstance(manifest.content, MetricsContent)  # Manifest ties content to kind
    if manifest.tensors:
        raise ArtifactRefused(
            f"tensor {min(manifest.tensors)!r}: metrics carry no tensors.", "Send tensors as a delta, or not at all."
        )
    if len(manifest.content.values) > METRICS_LIMIT:
        raise ArtifactRefused(
            f"{len(manifest.content.values)} metrics, more than the {METRICS_LIMIT} that may cross at once.",
            "Send summaries, not a number per row.",
        )
    for name in manifest.content.values:
        if not _METRIC_NAME.fullmatch(name):
            raise ArtifactRefused(
                f"metric name {name!r} is not allowed.",
                "Name metrics in at most 100 letters, digits, spaces and '_', '.', '/', '-'.",
            )
