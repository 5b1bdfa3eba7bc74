"""A crossing: an artefact goes from one party to another, through the gate and into the audit log.

The coordinator of a run on Ray and the parties that exchange folders both do it here.
"""

from __future__ import annotations

from pathlib import Path

from scaleot_ray.artifacts.artifact import Artifact
from scaleot_ray.artifacts.audit import AuditLog, Decision
from scaleot_ray.artifacts.delta_gate import ANY_START
from scaleot_ray.artifacts.gate import check_crossing, check_manifest
from scaleot_ray.artifacts.manifest import Kind, Manifest
from scaleot_ray.artifacts.manifest_json import render_manifest
from scaleot_ray.artifacts.storage import read_artifact
from scaleot_ray.artifacts.untrusted import untrusted
from scaleot_ray.errors import ArtifactRefused

AUDIT_FILE = "audit.jsonl"


def audit_beside(output: str | Path) -> AuditLog:
    """The audit log of a party that writes ``output`` by itself: ``audit.jsonl`` beside it, never inside."""
    return AuditLog(Path(output).expanduser().resolve().parent / AUDIT_FILE)


def cross(
    artifact: Artifact,
    sender: str,
    recipient: str,
    audit: AuditLog,
    *,
    parent: Manifest | None = None,
    start: str | None = None,
    decision: Decision = "sent",
) -> None:
    """Takes an artefact through the gate; the audit log has a line when this returns, and when it raises.

    Args:
        artifact: what is to cross.
        sender, recipient: parties, for the audit log.
        audit: where the line goes.
        parent: the emulator's manifest, for deltas and metrics.
        start: digest of the delta that a delta's tuning had to begin with, see :func:`check_crossing`.
        decision: what the line says of one that passes: ``sent`` or ``received``.

    Raises:
        ArtifactRefused: the gate does not let it pass.
        ResourcesMissing: the line cannot be written; the artefact must not cross then.
    """
    kind, digest, size = artifact.manifest.kind, artifact.digest, crossing_bytes(artifact.manifest)
    try:
        with untrusted():
            check_crossing(artifact, parent=parent, start=start)
    except ArtifactRefused as error:
        audit.record(sender, recipient, kind, size, digest, decision="refused", reason=error.problem)
        raise
    audit.record(sender, recipient, kind, size, digest, decision=decision)


def receive(
    directory: str | Path,
    kind: Kind,
    sender: str,
    recipient: str,
    audit: AuditLog,
    *,
    parent: Manifest | None = None,
) -> Artifact:
    """The artefact in a folder that another party sent, if it passes the gate; recorded either way.

    Args:
        directory: what came.
        kind: what it must be.
        sender, recipient: parties, for the audit log.
        audit: where the line goes.
        parent: the emulator's manifest, for deltas and metrics.

    Raises:
        ArtifactRefused: there is no such folder (nothing came, so nothing is recorded), it is damaged, or
            the gate does not let it pass.
        ResourcesMissing: the line cannot be written.
    """
    size, digest = 0, ""

    def gate(manifest: Manifest) -> None:
        nonlocal size, digest
        size, digest = crossing_bytes(manifest), manifest.digest()
        check_manifest(manifest, parent=parent, start=ANY_START)

    try:
        with untrusted():
            artifact = read_artifact(directory, expected_kind=kind, verify=False, gate=gate)  # cross verifies
    except ArtifactRefused as error:
        if Path(directory).is_dir():
            audit.record(sender, recipient, kind, size, digest, decision="refused", reason=error.problem)
        raise
    cross(artifact, sender, recipient, audit, parent=parent, start=ANY_START, decision="received")
    return artifact


def crossing_bytes(manifest: Manifest) -> int:
    """Bytes of all that crosses: tensors, files and the manifest itself."""
    return manifest.nbytes + len(render_manifest(manifest))
