"""Where accepted deltas and aggregates are kept, each under its digest, and the server optimizer's states."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from scaleot_ray.artifacts.artifact import Artifact
from scaleot_ray.artifacts.atomic import remove_directory
from scaleot_ray.artifacts.manifest import Manifest
from scaleot_ray.artifacts.storage import read_manifest, write_artifact
from scaleot_ray.errors import ResourcesMissing
from scaleot_ray.federation.folder import clear_unfinished
from scaleot_ray.plugin.aggregation import ServerState

KEY = "artifacts"
"""The setting that says where."""


class ArtifactStore(ABC):
    """What is in it is whole, and stays until it is removed: the registry names only what is in here.

    Attributes:
        root: the place of all artefacts, for people: a folder or a URI.
    """

    root: str

    def place(self, digest: str) -> str:
        """Where an artefact lies, for people and for the registry."""
        return f"{self.root}/{digest}"

    @abstractmethod
    def adding(self, artifact: Artifact) -> AbstractContextManager[Path]:
        """An artefact as a folder of this machine, to be looked at; in the store once the block is left.

        Where the block raises, nothing was added. An artefact that is there already stays as it is.

        Raises:
            ArtifactRefused: its tensors are not what its manifest says.
            ConfigError, ResourcesMissing: it cannot be written.
        """

    def add(self, artifact: Artifact) -> None:
        """Puts an artefact in; raises as :meth:`adding`."""
        with self.adding(artifact):
            pass

    @abstractmethod
    def has(self, digest: str) -> bool:
        """Whether an artefact is here, all of it."""

    @abstractmethod
    def fetch(self, digest: str) -> Path:
        """An artefact as a folder of this machine, which may go at the next :meth:`release`.

        Raises:
            ArtifactRefused: it is missing, or not what its digest says.
            ResourcesMissing: the store does not answer, or there is no room for it here.
        """

    @abstractmethod
    def manifest(self, digest: str) -> Manifest:
        """An artefact's manifest alone; raises as :meth:`fetch`."""

    @abstractmethod
    def digests(self) -> list[str]:
        """All that is here, also what is not whole."""

    @abstractmethod
    def remove(self, digest: str) -> None:
        """Removes an artefact, if it is here; raises ResourcesMissing where it cannot be."""

    @abstractmethod
    def release(self, kept: Collection[str]) -> None:
        """Frees the room that fetched artefacts take on this machine, but for some."""

    @abstractmethod
    def write_state(self, number: int, state: ServerState) -> None:
        """Keeps the server optimizer's state after a round, in place of an earlier one; raises ResourcesMissing."""

    @abstractmethod
    def state(self, number: int) -> ServerState | None:
        """The server optimizer's state after a round, if there is one; raises ArtifactRefused where it is damaged."""

    @abstractmethod
    def remove_state(self, number: int) -> None:
        """Removes a round's state, if there is one; raises ResourcesMissing where it cannot be."""


class FolderStore(ArtifactStore):
    """A folder of this machine, or one that is mounted here: artefacts are used where they lie."""

    def __init__(self, folder: Path) -> None:
        self._deltas, self._states = folder / "deltas", folder / "server"
        self.root = str(self._deltas)
        clear_unfinished(folder)

    @contextmanager
    def adding(self, artifact: Artifact) -> Iterator[Path]:
        """See :meth:`ArtifactStore.adding`."""
        place = self._deltas / artifact.digest
        new = not place.exists()
        if new:
            write_artifact(artifact, place)
        try:
            yield place
        except BaseException:
            if new:
                remove_directory(place)
            raise

    def has(self, digest: str) -> bool:
        """See :meth:`ArtifactStore.has`."""
        return (self._deltas / digest).is_dir()

    def fetch(self, digest: str) -> Path:
        """See :meth:`ArtifactStore.fetch`; whoever reads it finds out what it is."""
        return self._deltas / digest

    def manifest(self, digest: str) -> Manifest:
        """See :meth:`ArtifactStore.manifest`."""
        return read_manifest(self._deltas / digest)

    def digests(self) -> list[str]:
        """See :meth:`ArtifactStore.digests`."""
        return [path.name for path in self._deltas.glob("*") if not path.name.startswith(".")]

    def remove(self, digest: str) -> None:
        """See :meth:`ArtifactStore.remove`."""
        with in_words(self._deltas / digest, "removed"):
            remove_directory(self._deltas / digest)

    def release(self, kept: Collection[str]) -> None:
        """Nothing was fetched."""

    def write_state(self, number: int, state: ServerState) -> None:
        """See :meth:`ArtifactStore.write_state`."""
        with in_words(self._state(number), "written"):
            state.write(self._state(number))

    def state(self, number: int) -> ServerState | None:
        """See :meth:`ArtifactStore.state`."""
        return ServerState.read(self._state(number)) if self._state(number).exists() else None

    def remove_state(self, number: int) -> None:
        """See :meth:`ArtifactStore.remove_state`."""
        with in_words(self._state(number), "removed"):
            self._state(number).unlink(missing_ok=True)

    def _state(self, number: int) -> Path:
        return self._states / f"{number}.safetensors"


@contextmanager
def in_words(path: Path, done: str) -> Iterator[None]:
    """The system's errors as one with a remedy."""
    try:
        yield
    except OSError as error:
        raise ResourcesMissing(
            f"{KEY}: {path} cannot be {done} ({error.strerror or error}).",
            "See whether its disk has room, and may be written to; then run the same command again: what was "
            "acknowledged is there.",
        ) from error
