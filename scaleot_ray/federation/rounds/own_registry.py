"""Which registry is a run's own: on another machine its place may be empty, or hold that of another run.

A registry lies on one machine's disk, the run's folder may be on one that several machines share. So the folder
notes which registry belongs to it, and a run never goes on without that one: who was revoked would be back.
"""

from __future__ import annotations

import platform
from pathlib import Path

from scaleot_ray.errors import ConfigError
from scaleot_ray.federation.rounds.registry import Registry
from scaleot_ray.federation.rounds.registry.database import KEY
from scaleot_ray.stages.record import read_record, write_record

FILE = "registry.sqlite"
_NOTE = "registry.json"


def registry_file(registry: Path, emulator: str) -> Path:
    """The registry of the rounds on one emulator, in the folder that the setting ``registry`` names.

    Args:
        registry: that folder.
        emulator: the start of its digest.
    """
    return registry / emulator / FILE


def check_own(folder: Path, registry: Path, emulator: str) -> None:
    """Whether the registry is the one that the rounds on an emulator have had so far, if they have had any.

    Args:
        folder: of the run's coordinator.
        registry: where it should be.
        emulator: the start of its digest.

    Raises:
        ConfigError: it is not there, or another one is.
    """
    note, path = _note(folder, emulator), registry_file(registry, emulator)
    known = read_record(note)
    if "identity" not in known:
        return
    found = "there is none"
    if path.is_file():
        with Registry(path, write=False) as there:
            if there.identity() == known["identity"]:
                return
        found = "that is the registry of another run"
    raise ConfigError(
        f"{KEY}: this run's registry is not {path}: {found}. It was {known.get('file')} on {known.get('machine')}.",
        f"Go on there, or copy it here with no run under way (docs/administration.md, back-up) and set {KEY} to its "
        f"folder. To begin the rounds anew, with nobody revoked, remove {note}.",
    )


def note_own(folder: Path, registry: Registry, path: Path, emulator: str) -> None:
    """Notes in the run's folder which registry belongs to it."""
    note = _note(folder, emulator)
    values = {"identity": registry.identity(), "file": str(path), "machine": platform.node()}
    if read_record(note) != values:
        write_record(note, values)


def known_registries(folder: Path) -> list[tuple[str, Path]]:
    """Registries of the run's folder that are on this machine, with the start of their emulator's digest."""
    found = ((note.parent.name, read_record(note).get("file")) for note in sorted(folder.glob(f"*/{_NOTE}")))
    return [(emulator, Path(file)) for emulator, file in found if isinstance(file, str) and Path(file).is_file()]


def _note(folder: Path, emulator: str) -> Path:
    return folder / emulator / _NOTE
