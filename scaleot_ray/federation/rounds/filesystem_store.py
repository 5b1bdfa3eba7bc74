"""Artefacts kept on any file system that ``pyarrow.fs`` reaches (S3, GCS, HDFS …), and fetched to this machine for use.

Object stores have no folders that could be renamed into place, so an artefact is made visible by its last file: when
all others have been written and read back, ``manifest.sha256`` follows, and without it the artefact is not there. What
was cut short is no artefact therefore, and is written once more when it comes again.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow.fs import FileSelector, FileSystem, FileType

from scaleot_ray.artifacts.artifact import Artifact
from scaleot_ray.artifacts.atomic import atomic_directory, remove_directory
from scaleot_ray.artifacts.manifest import CHECKSUM_FILE, MANIFEST_FILE, Manifest
from scaleot_ray.artifacts.manifest_json import MANIFEST_LIMIT, parse_manifest
from scaleot_ray.artifacts.piecewise import StoredArtifact
from scaleot_ray.artifacts.storage import CHECKSUM_BYTES, entries_by_file, read_manifest, write_artifact
from scaleot_ray.errors import ArtifactRefused, ResourcesMissing
from scaleot_ray.federation.rounds.artifact_store import KEY, ArtifactStore, in_words
from scaleot_ray.plugin.aggregation import ServerState

_BLOCK = 8 << 20

_GONE = (
    "See whether it can be reached, has room, and its credentials have not expired; then run the same command again: "
    "what was acknowledged is there."
)
_DAMAGED = "Put back a copy of it, or revoke the data owner that it came from (`scaleot revoke`)."


class FilesystemStore(ArtifactStore):
    """A folder of a file system, and a cache on this machine that holds what is in use.

    Args:
        filesystem: where artefacts are kept.
        path: of the folder, as the file system calls it.
        name: of the folder, for people: a URI.
        cache: a folder of this machine, for this store alone.
    """

    def __init__(self, filesystem: FileSystem, path: str, name: str, cache: Path) -> None:
        self._filesystem, self._path, self._name, self._cache = filesystem, path, name, cache
        self.root = f"{name}/deltas"

    @contextmanager
    def adding(self, artifact: Artifact) -> Iterator[Path]:
        """See :meth:`ArtifactStore.adding`."""
        digest, place = artifact.digest, self._cache / artifact.digest
        new = not place.exists()
        if new:
            write_artifact(artifact, place)
        try:
            yield place
            if not self.has(digest):
                self._upload_artifact(place, f"deltas/{digest}")
        except BaseException:
            if new:
                remove_directory(place)
            raise

    def has(self, digest: str) -> bool:
        """See :meth:`ArtifactStore.has`."""
        with self._in_words("cannot be read"):
            found = self._filesystem.get_file_info(self._at(f"deltas/{digest}/{CHECKSUM_FILE}"))
        # Where a file shows while it is being written, it may have stayed short.
        return bool(found.type == FileType.File and found.size == CHECKSUM_BYTES)

    def fetch(self, digest: str) -> Path:
        """See :meth:`ArtifactStore.fetch`."""
        place = self._cache / digest
        if place.exists():
            return place
        manifest = self.manifest(digest)
        files = [MANIFEST_FILE, CHECKSUM_FILE, *entries_by_file(manifest), *manifest.files]
        with atomic_directory(place, manifest.nbytes, MANIFEST_FILE) as folder, self._about(folder, digest):
            for name in files:
                self._download(f"deltas/{digest}/{name}", folder / name)
            StoredArtifact(folder).verify()
            if read_manifest(folder).digest() != digest:
                raise ArtifactRefused(f"{folder}: holds another artefact than its name says.", _DAMAGED)
        return place

    def manifest(self, digest: str) -> Manifest:
        """See :meth:`ArtifactStore.manifest`."""
        name = f"deltas/{digest}/{MANIFEST_FILE}"
        if not self.has(digest):
            raise ArtifactRefused(f"{KEY}: {self.place(digest)} is missing, or not whole.", _DAMAGED)
        data = b"".join(islice(self._blocks(name), MANIFEST_LIMIT // _BLOCK + 1))  # one that is longer is refused
        try:
            manifest = parse_manifest(data)
        except ArtifactRefused as error:
            raise ArtifactRefused(f"{KEY}: {self._name}/{name}: {error.problem}", _DAMAGED) from None
        if manifest.digest() != digest:
            raise ArtifactRefused(f"{KEY}: {self._name}/{name} was altered: its digest is another.", _DAMAGED)
        return manifest

    def digests(self) -> list[str]:
        """See :meth:`ArtifactStore.digests`."""
        with self._in_words("cannot be listed"):
            found = self._filesystem.get_file_info(FileSelector(self._at("deltas"), allow_not_found=True))
        return [one.base_name for one in found if one.type == FileType.Directory]

    def remove(self, digest: str) -> None:
        """See :meth:`ArtifactStore.remove`."""
        remove_directory(self._cache / digest)
        self._remove_file(f"deltas/{digest}/{CHECKSUM_FILE}")  # first, so that half of it is no artefact
        with self._in_words("cannot be removed"):
            try:
                self._filesystem.delete_dir(self._at(f"deltas/{digest}"))
            except FileNotFoundError:
                return

    def release(self, kept: Collection[str]) -> None:
        """See :meth:`ArtifactStore.release`."""
        for place in self._cache.glob("*"):
            if place.name not in kept:
                remove_directory(place)

    def write_state(self, number: int, state: ServerState) -> None:
        """See :meth:`ArtifactStore.write_state`."""
        with self._scratch() as folder:
            with in_words(self._cache, "written"):
                state.write(folder / "state.safetensors")
            self._upload(folder / "state.safetensors", _state(number))

    def state(self, number: int) -> ServerState | None:
        """See :meth:`ArtifactStore.state`."""
        with self._in_words("cannot be read"):
            there = self._filesystem.get_file_info(self._at(_state(number))).type == FileType.File
        if not there:
            return None
        with self._scratch() as folder:
            self._download(_state(number), folder / "state.safetensors")
            try:
                return ServerState.read(folder / "state.safetensors")  # which has a checksum of its own
            except ArtifactRefused as error:
                problem = error.problem.replace(str(folder / "state.safetensors"), f"{self._name}/{_state(number)}")
                raise ArtifactRefused(f"{KEY}: {problem}", error.remedy) from None

    def remove_state(self, number: int) -> None:
        """See :meth:`ArtifactStore.remove_state`."""
        self._remove_file(_state(number))

    def _upload_artifact(self, place: Path, name: str) -> None:
        files = sorted(path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file())
        for file in [*(file for file in files if file != CHECKSUM_FILE), CHECKSUM_FILE]:
            self._upload(place / file, f"{name}/{file}")

    def _upload(self, source: Path, name: str) -> None:
        """Writes a file and reads it back: what is acknowledged afterwards must be there."""
        path, digest = self._at(name), hashlib.sha256()
        with source.open("rb") as file, self._in_words("cannot be written"):
            make_folder(self._filesystem, path.rpartition("/")[0])
            with self._filesystem.open_output_stream(path, compression=None) as sink:
                while block := file.read(_BLOCK):
                    digest.update(block)
                    sink.write(block)
        found = hashlib.sha256()
        for block in self._blocks(name):
            found.update(block)
        if found.digest() != digest.digest():
            raise ResourcesMissing(f"{KEY}: {self._name}/{name} does not hold what was just written to it.", _GONE)

    def _download(self, name: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as file:
            for block in self._blocks(name):
                file.write(block)

    def _blocks(self, name: str) -> Iterator[Any]:
        with self._in_words("cannot be read"):
            try:
                stream = self._filesystem.open_input_stream(self._at(name), compression=None)
            except FileNotFoundError as error:
                raise ArtifactRefused(f"{KEY}: {self._name}/{name} is missing.", _DAMAGED) from error
            with stream:
                while block := stream.read(_BLOCK):
                    yield block

    def _remove_file(self, name: str) -> None:
        with self._in_words("cannot be removed"):
            # Asked for first: object stores do not say whether what they removed was there, others raise.
            if self._filesystem.get_file_info(self._at(name)).type == FileType.File:
                self._filesystem.delete_file(self._at(name))

    def _at(self, name: str) -> str:
        return f"{self._path}/{name}"

    @contextmanager
    def _scratch(self) -> Iterator[Path]:
        with in_words(self._cache, "written"):
            self._cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._cache) as folder:
            yield Path(folder)

    @contextmanager
    def _about(self, folder: Path, digest: str) -> Iterator[None]:
        """Refusals of what was fetched into a folder, as ones of where it came from."""
        try:
            yield
        except ArtifactRefused as error:
            problem = error.problem.replace(str(folder), self.place(digest)).removeprefix(f"{KEY}: ")
            raise ArtifactRefused(f"{KEY}: {problem}", _DAMAGED) from None

    @contextmanager
    def _in_words(self, problem: str) -> Iterator[None]:
        """The file system's errors as one with a remedy."""
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            raise ResourcesMissing(f"{KEY}: {self._name} {problem} ({first_line(error)}).", _GONE) from error


def make_folder(filesystem: FileSystem, path: str) -> None:
    """Makes a folder where files need one; raises as the file system does."""
    # In an object store it would be an object of its own, which nothing needs and not everyone may write.
    if filesystem.type_name not in ("s3", "gcs"):
        filesystem.create_dir(path, recursive=True)


def first_line(error: Exception) -> str:
    """What a file system says is wrong, without the details that follow."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _state(number: int) -> str:
    return f"server/{number}.safetensors"
