"""Artefacts in Ray's object store: put once, read by every actor of the machine without a copy.

An artefact travels as its manifest, its files, and one byte array per tensor. Ray writes numpy arrays
into shared memory as they are (0.11 s/GiB) and readers map them (4 ms/GiB), while torch tensors go
through a pickle and every reader gets a copy. Types that numpy lacks, such as bfloat16, need no care:
the manifest has type and shape, the array has bytes.

The mapping that readers get is writable. numpy refuses to write through it, torch does not know: an
in-place operation of one reader on a tensor from here changes what all readers see. So readers train
copies only (:mod:`scaleot_ray.tuning` does), and at the end of the round everyone who read compares
what is there with the manifest: :func:`check_unchanged`.
"""

from __future__ import annotations

import warnings
from typing import TypedDict

import numpy as np
import numpy.typing as npt
import torch

from scaleot_ray.artifacts.artifact import Artifact
from scaleot_ray.artifacts.manifest import Kind
from scaleot_ray.artifacts.manifest_json import parse_sent, render_manifest
from scaleot_ray.artifacts.raw_bytes import DTYPES, fingerprint, raw_bytes
from scaleot_ray.errors import ArtifactRefused, RunFailed


class Shared(TypedDict):
    """What is put: the manifest as JSON, the raw bytes of each tensor (uint8), the files."""

    manifest: bytes
    tensors: dict[str, npt.NDArray[np.uint8]]
    files: dict[str, bytes]


def to_shared(artifact: Artifact) -> Shared:
    """An artefact as ``ray.put`` takes it; its arrays are views of the artefact's tensors."""
    return {
        "manifest": render_manifest(artifact.manifest),
        "tensors": {name: raw_bytes(tensor) for name, tensor in artifact.tensors.items()},
        "files": dict(artifact.files),
    }


def from_shared(shared: Shared, expected_kind: Kind | None = None) -> Artifact:
    """The artefact that :func:`to_shared` was given; its tensors are views of the shared memory.

    They require no gradient and must not be written to. Only sizes are checked here: call
    :meth:`Artifact.verify` or the gate before use.

    Args:
        shared: what came.
        expected_kind: what it is to be, for the length of its manifest; whether it is, the caller checks.

    Raises:
        ArtifactRefused: it has another form than :func:`to_shared` gives, the manifest is no manifest, or an array
            is not as long as its tensor; names it.
    """
    _check_form(shared)
    manifest = parse_sent(shared["manifest"], expected_kind)
    tensors = {}
    for name, array in shared["tensors"].items():
        tensors[name] = _view(array)  # one that is not on the manifest stays bytes, and is refused as extra
        entry = manifest.tensors.get(name)
        if entry is not None:
            if array.nbytes != entry.nbytes:
                raise ArtifactRefused(
                    f"tensor {name!r} has {array.nbytes} bytes, its manifest says {entry.nbytes}.",
                    "Send the artefact again as scaleot_ray made it.",
                )
            tensors[name] = tensors[name].view(DTYPES[entry.dtype]).view(entry.shape)
    return Artifact(manifest, tensors, dict(shared["files"]))


def _check_form(shared: object) -> None:
    """Refuses what is no artefact at all: whoever sends it may send anything."""
    remedy = "Send the artefact again as scaleot_ray made it."
    if not isinstance(shared, dict) or shared.keys() != Shared.__annotations__.keys():
        raise ArtifactRefused("what came is no artefact: manifest, tensors and files.", remedy)
    if not isinstance(shared["manifest"], bytes):
        raise ArtifactRefused("the manifest that came is no bytes.", remedy)
    for key, kind in (("tensors", np.ndarray), ("files", bytes)):
        if not isinstance(shared[key], dict):
            raise ArtifactRefused(f"the {key} that came have no names.", remedy)
        for name, value in shared[key].items():
            if not isinstance(name, str) or not isinstance(value, kind):
                raise ArtifactRefused(f"one of the {key} that came is no {kind.__name__} with a name.", remedy)
    for array in shared["tensors"].values():
        if array.dtype != np.uint8 or array.ndim != 1 or not array.flags.c_contiguous:
            raise ArtifactRefused("one of the tensors that came is no plain row of bytes.", remedy)


def check_unchanged(artifact: Artifact, reader: str) -> None:
    """Compares the tensors with the manifest once more, at the end of a round.

    Args:
        artifact: as it came from :func:`from_shared`, before anything was done with it.
        reader: who looks, for the message.

    Raises:
        RunFailed: a tensor is not what was put; names it and who found it.
    """
    for name, entry in artifact.manifest.tensors.items():
        if fingerprint(artifact.tensors[name])[0] != entry.sha256:
            raise RunFailed(
                f"{reader} found that tensor {name!r} of the shared {artifact.manifest.kind} was written to during "
                "the run; every actor that read it may have computed with other values.",
                "Do not use this run's deltas. Something trains a tensor of the shared emulator in place: "
                "copy what is trained first.",
            )


def _view(array: npt.NDArray[np.uint8]) -> torch.Tensor:
    with warnings.catch_warnings():
        # torch warns that it cannot make a tensor read-only; that is what check_unchanged is for.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)
