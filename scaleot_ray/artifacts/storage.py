"""Artefacts on disk: one directory with ``manifest.json``, tensor files and small files.

``manifest.sha256`` holds the manifest's own SHA-256 in the form ``sha256sum -c`` reads, so that every
byte of the directory is covered: the manifest by it, everything else by the manifest. It tells damage,
not deceit: what parties compare is :meth:`Manifest.digest`.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from scaleot_ray.artifacts.artifact import Artifact, verify_file, verify_tensor
from scaleot_ray.artifacts.atomic import atomic_directory
from scaleot_ray.artifacts.directory import check_listing, open_inside, read_inside
from scaleot_ray.artifacts.manifest import CHECKSUM_FILE, MANIFEST_FILE, Kind, Manifest, TensorEntry
from scaleot_ray.artifacts.manifest_json import MANIFEST_LIMIT, parse_manifest, parse_sent, render_manifest, sent_limit
from scaleot_ray.artifacts.tensor_file import read_tensor_file, tensor_file_header, write_tensor_file
from scaleot_ray.errors import ArtifactRefused

CHECKSUM_BYTES = 64 + len(f"  {MANIFEST_FILE}\n")
"""Size of ``manifest.sha256``: the digest in hex, and what ``sha256sum`` writes after it."""

_BLOCK = 4096
_REMEDY = "Fetch the artefact again from its sender; if it is refused again, do not use it."


def write_artifact(artifact: Artifact, directory: str | Path, overwrite: bool = False) -> Path:
    """Writes an artefact as ``directory``, whole or not at all.

    Raises:
        ArtifactRefused: the artefact's tensors or files are not (any more) what its manifest says.
        ConfigError: the directory exists and ``overwrite`` is off, is no artefact, or may not be written.
        ResourcesMissing: the disk has too little room; nothing is left behind.
    """
    manifest = render_manifest(artifact.manifest)
    parse_manifest(manifest)  # what could not be read again is not written
    artifact.verify()
    shards = entries_by_file(artifact.manifest)
    files = {**artifact.files, MANIFEST_FILE: manifest, CHECKSUM_FILE: _checksum(manifest)}
    sizes = [len(data) for data in files.values()]
    for entries in shards.values():
        sizes.append(len(tensor_file_header(entries)) + sum(entry.nbytes for entry in entries.values()))
    needed = sum(-(-size // _BLOCK) * _BLOCK for size in sizes)
    with atomic_directory(directory, needed, MANIFEST_FILE, overwrite) as folder:
        for name, entries in shards.items():
            with open(folder / name, "xb", buffering=0) as file:
                write_tensor_file(file, entries, artifact.tensors)
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
    return Path(directory)


def read_manifest(directory: str | Path) -> Manifest:
    """The manifest of an artefact on disk, without its tensors.

    Raises:
        ArtifactRefused: it is missing, too long, malformed, from a newer schema or altered.
    """
    directory = Path(directory)
    with about(directory):
        data = _manifest_data(directory)
        manifest = parse_manifest(data)
        _check_checksum(directory, data)
    return manifest


def read_files(directory: str | Path, manifest: Manifest) -> dict[str, bytes]:
    """The files of an artefact on disk that are no tensors: card, licence, tokenizer.

    Raises:
        ArtifactRefused: one of them is missing or is not what ``manifest`` says.
    """
    with about(Path(directory)):
        return _files(Path(directory), manifest)


def read_artifact(
    directory: str | Path,
    expected_kind: Kind | None = None,
    verify: bool = True,
    gate: Callable[[Manifest], None] | None = None,
) -> Artifact:
    """The artefact in ``directory``, in memory of its own: later changes to the files do not reach it.

    Args:
        directory: what :func:`write_artifact` wrote.
        expected_kind: refuse artefacts of another kind.
        verify: check every tensor's SHA-256 and that its values are finite; everything else is
            checked in any case.
        gate: of what another party sent: refuses by the manifest, before anything else of it is read.

    Raises:
        ArtifactRefused: ``gate`` refuses it, a file or tensor is missing, extra, misshaped, of another type,
            not finite, truncated or altered, a name leads out of the directory, or :func:`read_manifest` refuses
            it; the message names the directory and the file or tensor.
    """
    directory = Path(directory)
    with about(directory):
        data = _manifest_data(directory, sent_limit(expected_kind) if gate is not None else MANIFEST_LIMIT)
        manifest = parse_manifest(data) if gate is None else parse_sent(data, expected_kind)
        if expected_kind is not None and manifest.kind != expected_kind:
            raise ArtifactRefused(
                f"is an artefact of kind {manifest.kind!r}, expected {expected_kind!r}.",
                f"Give the directory of an artefact of kind {expected_kind!r}.",
            )
    if gate is not None:
        gate(manifest)
    with about(directory):
        shards = entries_by_file(manifest)
        check_listing(directory, [MANIFEST_FILE, CHECKSUM_FILE, *shards, *manifest.files])
        files = _files(directory, manifest)
        tensors: dict[str, torch.Tensor] = {}
        for name, entries in shards.items():
            with open_inside(directory, name) as (file, size):
                tensors.update(read_tensor_file(file, size, name, entries))
        if verify:
            for name, entry in manifest.tensors.items():
                verify_tensor(name, entry, tensors[name])
        # Last, since the checks above say more precisely what is wrong.
        _check_checksum(directory, data)
    return Artifact(manifest, {name: tensors[name] for name in manifest.tensors}, files)


@contextmanager
def about(directory: Path) -> Iterator[None]:
    """Puts the directory in front of a refusal, and turns a read error into one."""
    try:
        yield
    except ArtifactRefused as error:
        raise ArtifactRefused(f"{directory}: {error.problem}", error.remedy) from None
    except OSError as error:
        raise ArtifactRefused(f"{directory}: cannot be read ({error.strerror}).", _REMEDY) from error


def _manifest_data(directory: Path, limit: int = MANIFEST_LIMIT) -> bytes:
    if not directory.is_dir():
        raise ArtifactRefused("there is no such directory.", "Give the directory of an artefact.")
    return read_inside(directory, MANIFEST_FILE, limit)


def _check_checksum(directory: Path, manifest: bytes) -> None:
    expected = _checksum(manifest)
    if read_inside(directory, CHECKSUM_FILE, len(expected)) != expected:
        raise ArtifactRefused(f"{MANIFEST_FILE} was altered: its SHA-256 is not that in {CHECKSUM_FILE}.", _REMEDY)


def _files(directory: Path, manifest: Manifest) -> dict[str, bytes]:
    files = {name: read_inside(directory, name, entry.bytes) for name, entry in manifest.files.items()}
    for name, entry in manifest.files.items():
        verify_file(name, entry, files[name])
    return files


def _checksum(manifest: bytes) -> bytes:
    return f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST_FILE}\n".encode()


def entries_by_file(manifest: Manifest) -> dict[str, dict[str, TensorEntry]]:
    """The tensor files of an artefact, each with the tensors it holds."""
    files: dict[str, dict[str, TensorEntry]] = defaultdict(dict)
    for name, entry in manifest.tensors.items():
        files[entry.file][name] = entry
    return dict(files)
