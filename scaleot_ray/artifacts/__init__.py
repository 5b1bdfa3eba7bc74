"""What crosses between parties: manifest, tensors, digests, the gate, the audit log."""

from scaleot_ray.artifacts.artifact import Artifact
from scaleot_ray.artifacts.atomic import atomic_directory
from scaleot_ray.artifacts.audit import AuditLog
from scaleot_ray.artifacts.card import model_card
from scaleot_ray.artifacts.gate import check_crossing
from scaleot_ray.artifacts.inspect import describe, layer_picture
from scaleot_ray.artifacts.manifest import (
    SCHEMA_VERSION,
    DeltaContent,
    EmulatorContent,
    FileEntry,
    HarmonizerSpec,
    Manifest,
    MetricsContent,
    TensorEntry,
)
from scaleot_ray.artifacts.storage import read_artifact, read_manifest, write_artifact

__all__ = [
    "SCHEMA_VERSION",
    "Artifact",
    "AuditLog",
    "DeltaContent",
    "EmulatorContent",
    "FileEntry",
    "HarmonizerSpec",
    "Manifest",
    "MetricsContent",
    "TensorEntry",
    "atomic_directory",
    "check_crossing",
    "describe",
    "layer_picture",
    "model_card",
    "read_artifact",
    "read_manifest",
    "write_artifact",
]
