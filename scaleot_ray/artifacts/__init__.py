"""What crosses between parties: manifest, tensors, digests, the gate, the audit log."""

from scaleot_ray.artifacts.artifact import Artifact
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

__all__ = [
    "SCHEMA_VERSION",
    "Artifact",
    "DeltaContent",
    "EmulatorContent",
    "FileEntry",
    "HarmonizerSpec",
    "Manifest",
    "MetricsContent",
    "TensorEntry",
]
