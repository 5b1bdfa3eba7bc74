"""Where a run keeps the artefacts it was sent: a folder, or a URI of a file system that ``pyarrow.fs`` knows."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import pyarrow as pa
from pyarrow.fs import FileSystem, LocalFileSystem

from scaleot_ray.errors import ConfigError
from scaleot_ray.federation.rounds.aggregates import in_use
from scaleot_ray.federation.rounds.artifact_store import KEY, ArtifactStore, FolderStore
from scaleot_ray.federation.rounds.filesystem_store import FilesystemStore, first_line, make_folder
from scaleot_ray.federation.rounds.registry import Registry
from scaleot_ray.result_folder import is_uri

_SECRETS = ("key", "secret", "password", "token", "credential")


@dataclass(frozen=True)
class Location:
    """A place that the setting ``artifacts`` names.

    Attributes:
        text: what was set.
        path: the place, as its file system calls it.
        filesystem: of ``pyarrow.fs``; None for a folder of this machine, which is used as it is.
    """

    text: str
    path: str
    filesystem: FileSystem | None = None

    @classmethod
    def of(cls, text: str) -> Location:
        """The place of a setting; whether it can be reached, :meth:`check` finds out.

        Raises:
            ConfigError: no file system has such URIs, or it cannot be set up, or the URI holds a secret.
        """
        if not is_uri(text):
            path = str(Path(text).expanduser().absolute())
            return cls(path, path)
        parts = urlsplit(text)
        secret = [name for name, _ in parse_qsl(parts.query) if any(word in name.lower() for word in _SECRETS)]
        if parts.password is not None or secret:
            raise ConfigError(
                f"{KEY}: the URI holds a secret, which would be written to the registry.",
                "Leave it out; give credentials as the file system's own environment variables or files.",
            )
        try:
            filesystem, path = FileSystem.from_uri(text)
        except (OSError, pa.ArrowException, ImportError) as error:
            raise ConfigError(
                f"{KEY}: {_plain(text)} cannot be used ({first_line(error)}).",
                "Give a folder, or a URI that pyarrow.fs knows: s3://bucket/folder, gs://…, abfss://…, hdfs://…, "
                "file:///…",
            ) from error
        return cls(text, path.rstrip("/"), filesystem)

    @property
    def name(self) -> str:
        """The place for people: without options."""
        return _plain(self.text)

    def check(self) -> None:
        """Writes a small file there, reads it and removes it.

        Raises:
            ConfigError: one of it does not work.
        """
        filesystem, probe = self.filesystem or LocalFileSystem(), f"{self.path}/.scaleot-{secrets.token_hex(4)}.probe"
        try:
            make_folder(filesystem, self.path)
            with filesystem.open_output_stream(probe, compression=None) as sink:
                sink.write(b"scaleot")
            with filesystem.open_input_stream(probe, compression=None) as stream:
                found = stream.read()
            filesystem.delete_file(probe)
        except (OSError, pa.ArrowException) as error:
            raise ConfigError(
                f"{KEY}: {self.name} cannot be written to ({first_line(error)}).",
                f"Set {KEY} to a place that is there and that you may write to, and see that its credentials are in "
                "the environment; where an existing Ray is used, in that of its node.",
            ) from error
        if found != b"scaleot":
            raise ConfigError(f"{KEY}: {self.name} does not give back what was written.", "Set it to another place.")


def open_store(location: Location | None, registry: Registry, emulator: str, folder: Path) -> ArtifactStore:
    """The store of the rounds on one emulator.

    Any number of runs may keep artefacts in one place: each has a folder there that is named after its registry.

    Args:
        location: where it is; None: where it has been so far, at first ``folder``.
        registry: names what must be in it; is told where it is.
        emulator: the start of its digest.
        folder: the run's own for that emulator, on this machine.

    Raises:
        ConfigError: the place cannot be used, or lacks what the run has kept elsewhere so far.
        ResourcesMissing: it does not answer.
    """
    before, within = registry.artifacts(), f"{emulator}/{registry.identity()}"
    if location is None and before:
        location = Location.of(before)
    if location is None:
        return FolderStore(folder)
    store = _store(location, within, folder)
    if location.text != before:
        lacking = sorted(digest for digest in in_use(registry) if not store.has(digest))
        if lacking:
            there = f"{_plain(before)}/{within}" if before else folder
            raise ConfigError(
                f"{KEY}: {len(lacking)} artefacts of this run are not in {store.root} (the first is {lacking[0]}).",
                f"Copy the folder {there}, where they are, to {store.root.removesuffix('/deltas')}; or leave {KEY} as "
                "it was.",
            )
        registry.note_artifacts(location.text, store.root)
    return store


def _store(location: Location | None, within: str, folder: Path) -> ArtifactStore:
    if location is None:
        return FolderStore(folder)
    if location.filesystem is None:
        return FolderStore(Path(location.path) / within)
    return FilesystemStore(
        location.filesystem, f"{location.path}/{within}", f"{location.name}/{within}", folder / "cache"
    )


def _plain(text: str) -> str:
    return text.partition("?")[0].rstrip("/")
