"""The folder of a run: where its parts lie, and that one run at a time writes to it.

::

    emulator/              artefact: what every data owner receives
    model_owner/           stage-1 results; stay with the owner
    tenants/NAME/delta/    artefact: what NAME sends back; metrics/ beside it
    evaluator/NAME/        rows measured with both secrets, where an evaluator is declared
    coordinator/DIGEST/    what came back for the emulator of this digest: registry, deltas, aggregates (of which only
                           those in use, where the setting artifacts names another place)
    coordinator/tables/    rows that evaluators have sent
    coordinator/requests/  what an administrator asks of a run that is under way
    audit.jsonl            one line for every crossing
    run.log                one line for everything that happens
    report.json            the result
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from scaleot_ray.errors import ConfigError

_OWN = ("model_owner", "tenants", "evaluator", "coordinator")
_LEFT_AT_THE_TOP = re.compile(r"\.scaleot-[0-9a-f]+\.(partial|replaced)|\.report\.json\.\d+")
_LEFT_INSIDE = re.compile(r"\.scaleot-[0-9a-f]+\.(partial|replaced)|\..+\.(safetensors|json)\.\d+")

# Whoever only looks whether a run is there has the lock as well, for a moment: is_held.
_LOOKS, _LOOK_SECONDS = 10, 0.02


class FolderHeld(ConfigError):
    """A run is working in the folder."""


@dataclass(frozen=True)
class RunFolder:
    """Places inside a run's folder."""

    path: Path

    @property
    def emulator(self) -> Path:
        """The emulator artefact."""
        return self.path / "emulator"

    @property
    def model_owner(self) -> Path:
        """Stage-1 results."""
        return self.path / "model_owner"

    @property
    def audit(self) -> Path:
        """The audit log."""
        return self.path / "audit.jsonl"

    @property
    def log(self) -> Path:
        """What happened, a line each."""
        return self.path / "run.log"

    @property
    def coordinator(self) -> Path:
        """What the coordinator keeps, by emulator."""
        return self.path / "coordinator"

    @property
    def requests(self) -> Path:
        """What is asked of a run that is under way, and its answers."""
        return self.coordinator / "requests"

    def table(self, name: str) -> Path:
        """The rows that the evaluator of a tenant has sent."""
        return self.coordinator / "tables" / f"{name}.json"

    def tenant(self, name: str) -> Path:
        """A data owner's own folder."""
        return self.path / "tenants" / name

    def evaluator(self, name: str) -> Path:
        """What the evaluator keeps of a tenant."""
        return self.path / "evaluator" / name

    @contextmanager
    def held(self) -> Iterator[None]:
        """Holds the folder for one run, and clears away what a killed one left half-written.

        Raises:
            FolderHeld: another run holds it.
            ConfigError: it cannot be written, or its file system has no locks.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ConfigError(
                f"output: {self.path} cannot be written ({error.strerror or error}).",
                "Set output to a folder that you may write to.",
            ) from error
        try:
            try:
                _lock(handle)
            except BlockingIOError:
                raise FolderHeld(
                    f"output: another run is working in {self.path}.", "Wait for it, or set output to another folder."
                ) from None
            except OSError as error:
                raise ConfigError(
                    f"output: {self.path} cannot be locked against other runs ({error.strerror or error}).",
                    "Have its file system mounted with locks (Lustre: the option flock; NFS: its lock service), or set "
                    "output to a folder on another disk.",
                ) from error
            self._clear()
            yield
        finally:
            os.close(handle)

    def is_held(self) -> bool:
        """Whether a run is working in the folder just now; not where its file system has no locks."""
        try:
            handle = os.open(self.path / ".lock", os.O_RDONLY)
        except OSError:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        finally:
            os.close(handle)
        return False

    def _clear(self) -> None:
        # Whatever is renamed into place last has such a name before. The folder may be one that the user
        # keeps other things in, so only what a run itself makes is looked at.
        left = [path for path in self.path.glob(".*") if _LEFT_AT_THE_TOP.fullmatch(path.name)]
        _remove(left)
        for own in _OWN:
            clear_unfinished(self.path / own)


def _lock(handle: int) -> None:
    """Takes the lock for oneself alone; raises BlockingIOError where a run has it."""
    for _ in range(_LOOKS):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_LOOK_SECONDS)
        else:
            return
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def clear_unfinished(folder: Path) -> None:
    """Removes what a process that was killed left half-written in a folder; nobody may be writing to it."""
    _remove([path for path in folder.rglob(".*") if _LEFT_INSIDE.fullmatch(path.name)])


def _remove(left: list[Path]) -> None:
    for path in left:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
