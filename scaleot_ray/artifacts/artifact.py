"""An artefact in memory: a manifest, its tensors and its files."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import torch

from scaleot_ray import __version__
from scaleot_ray.artifacts.manifest import SCHEMA_VERSION, Content, FileEntry, Kind, Manifest, TensorEntry
from scaleot_ray.artifacts.raw_bytes import dtype_name, fingerprint
from scaleot_ray.artifacts.untrusted import quoted
from scaleot_ray.errors import ArtifactRefused

SHARD_BYTES = 2 << 30
"""Tensor bytes in one safetensors file; an artefact with more is split over several."""

_ALTERED = "Fetch the artefact again from its sender; if it is refused again, do not use it."


@dataclass
class Artifact:
    """What crosses between parties: every byte of it is on the manifest.

    Tensors are contiguous and on the CPU. They may share memory with the model they come from, so
    :meth:`verify` (the gate, and writing, call it) notices when that has changed since.
    """

    manifest: Manifest
    tensors: dict[str, torch.Tensor]
    files: dict[str, bytes]

    @classmethod
    def create(
        cls,
        kind: Kind,
        content: Content,
        tensors: Mapping[str, torch.Tensor],
        files: Mapping[str, bytes] | None = None,
        family: str | None = None,
        model_config: dict[str, Any] | None = None,
        parent_digest: str | None = None,
        base_model: str | None = None,
        licence: str | None = None,
        shard_bytes: int = SHARD_BYTES,
    ) -> Artifact:
        """An artefact of ``tensors`` and ``files``, with its manifest.

        Args:
            kind: ``emulator``, ``delta`` or ``metrics``; ``content`` is that kind's class.
            tensors: by name; moved to the CPU and made contiguous where they are not, else not copied.
            files: small files by name (card, tokenizer).
            family: name of the model family.
            model_config: the Hugging Face config as ``to_dict()`` gives it.
            parent_digest: digest of the artefact this one was made from.
            base_model, licence: name of the base model and its licence notice, short and plain
                (:mod:`~scaleot_ray.artifacts.provenance`).
            shard_bytes: tensor bytes in one file.

        Raises:
            ArtifactRefused: a tensor has no data, a type artefacts do not carry or values that are not
                finite, or a name or notice is not allowed.
        """
        plain = {name: _plain(name, tensor) for name, tensor in tensors.items()}
        shards = _shards(plain, shard_bytes)
        entries, sizes = {}, Counter[str]()
        for name, tensor in plain.items():
            sha256, finite = fingerprint(tensor)
            if not finite:
                raise _not_finite(name)
            dtype = dtype_name(tensor.dtype)
            assert dtype is not None  # _plain has refused the others
            entries[name] = TensorEntry(dtype=dtype, shape=list(tensor.shape), sha256=sha256, file=shards[name])
            sizes[dtype] += tensor.numel()
        contents = dict(files or {})
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            kind=kind,
            library_version=__version__,
            created=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            family=family,
            model_config_json=model_config,
            dtype=sizes.most_common(1)[0][0] if sizes else None,
            content=content,
            tensors=entries,
            files={name: _file_entry(data) for name, data in contents.items()},
            parent_digest=parent_digest,
            base_model=base_model,
            licence=licence,
        )
        return cls(manifest, plain, contents)

    @classmethod
    def made_from(
        cls, parent: Manifest, kind: Kind, content: Content, tensors: Mapping[str, torch.Tensor] | None = None
    ) -> Artifact:
        """A data owner's artefact: tied to the emulator ``parent``, from which it takes what it says of the model.

        Raises:
            ArtifactRefused: as :meth:`create`.
        """
        return cls.create(
            kind,
            content,
            tensors or {},
            family=parent.family,
            parent_digest=parent.digest(),
            base_model=parent.base_model,
            licence=parent.licence,
        )

    def with_files(self, files: Mapping[str, bytes]) -> Artifact:
        """The same artefact with files added or replaced (the card, which is made from the manifest)."""
        values = {
            **dict(self.manifest),
            "files": {**self.manifest.files, **{n: _file_entry(d) for n, d in files.items()}},
        }
        return Artifact(Manifest(**values), self.tensors, {**self.files, **files})

    @property
    def digest(self) -> str:
        """The manifest's digest."""
        return self.manifest.digest()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors and files."""
        return self.manifest.nbytes

    def verify(self) -> None:
        """Checks names, shapes, types, values and SHA-256 of every tensor and file against the manifest.

        Raises:
            ArtifactRefused: something is missing, extra, misshaped, of another type, not finite or
                altered; the message names the tensor or file.
        """
        check_names("tensor", self.manifest.tensors, self.tensors)
        check_names("file", self.manifest.files, self.files)
        for name, entry in self.manifest.tensors.items():
            verify_tensor(name, entry, self.tensors[name])
        for name, listed in self.manifest.files.items():
            verify_file(name, listed, self.files[name])


def check_names(what: str, expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Refuses when ``found`` lacks a name of ``expected`` or has one more.

    Raises:
        ArtifactRefused: names the first one, and how many there are.
    """
    for problem, names in (
        ("is missing", expected.keys() - found.keys()),
        ("is extra", found.keys() - expected.keys()),
    ):
        if names:
            others = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            not_listed = ": it is not on the manifest" if problem == "is extra" else ""
            raise ArtifactRefused(f"{what} {quoted(min(names))} {problem}{others}{not_listed}.", _ALTERED)


def verify_tensor(name: str, entry: TensorEntry, tensor: torch.Tensor) -> None:
    """Checks one tensor against its entry.

    Raises:
        ArtifactRefused: its type, shape, values or SHA-256 are not what the entry says.
    """
    if (found := dtype_name(tensor.dtype)) != entry.dtype:
        raise ArtifactRefused(f"tensor {name!r} has type {found or tensor.dtype}, expected {entry.dtype}.", _ALTERED)
    if list(tensor.shape) != entry.shape:
        raise ArtifactRefused(f"tensor {name!r} has shape {list(tensor.shape)}, expected {entry.shape}.", _ALTERED)
    sha256, finite = fingerprint(_plain(name, tensor))
    if not finite:
        raise _not_finite(name)
    if sha256 != entry.sha256:
        raise altered(name)


def altered(name: str) -> ArtifactRefused:
    """The refusal of a tensor whose SHA-256 is not that of its entry."""
    return ArtifactRefused(f"tensor {name!r} was altered: its SHA-256 is not the manifest's.", _ALTERED)


def verify_file(name: str, entry: FileEntry, data: bytes) -> None:
    """Checks one file against its entry.

    Raises:
        ArtifactRefused: its size or SHA-256 is not what the entry says.
    """
    if len(data) != entry.bytes:
        raise ArtifactRefused(f"file {name!r} has {len(data)} bytes, expected {entry.bytes}.", _ALTERED)
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise ArtifactRefused(f"file {name!r} was altered: its SHA-256 is not the manifest's.", _ALTERED)


def _plain(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_meta or tensor.layout != torch.strided:
        raise ArtifactRefused(f"tensor {name!r} holds no plain data.", "Load (gather) the weights before sending them.")
    if dtype_name(tensor.dtype) is None:
        raise ArtifactRefused(
            f"tensor {name!r} has type {tensor.dtype}, which artefacts do not carry.",
            "Convert it to float32, bfloat16 or float16.",
        )
    return tensor.detach().to("cpu").contiguous()


def _shards(tensors: Mapping[str, torch.Tensor], shard_bytes: int) -> dict[str, str]:
    """File of each tensor: in the given order, a new file when the next tensor would not fit."""
    numbers, number, used = {}, 1, 0
    for name, tensor in tensors.items():
        if used and used + tensor.nbytes > shard_bytes:
            number, used = number + 1, 0
        used += tensor.nbytes
        numbers[name] = number
    names = shard_names(number)
    return {name: names[own - 1] for name, own in numbers.items()}


def shard_names(count: int) -> list[str]:
    """Names of the tensor files of an artefact that has ``count`` of them."""
    if count == 1:
        return ["tensors.safetensors"]
    return [f"tensors-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _file_entry(data: bytes) -> FileEntry:
    return FileEntry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _not_finite(name: str) -> ArtifactRefused:
    return ArtifactRefused(
        f"tensor {name!r} has values that are not finite (NaN or infinity).",
        "Tune again with a lower learning rate, or ask the sender for an artefact without them.",
    )
