"""Which registry is a run's own: on another machine its place may be empty, or hold that of another run.

A registry lies on one machine's disk, the run's folder may be on one that several machines share. So the folder
notes which registry belongs to it, and a run never goes on without that one: who was revoked would be back.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

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
    if _is_that(path, known):
        return
    found = "that is the registry of another run" if path.is_file() else "there is none"
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


def known_registries(folder: Path, registry: Path) -> list[tuple[str, Path]]:
    """Registries of a run that are on this machine, with the start of their emulator's digest.

    Only that of the present emulator is noted anew where it is moved; the others have moved with it.

    Args:
        folder: of the run's coordinator.
        registry: where the setting ``registry`` says they are by now.
    """
    found = []
    for note in sorted(folder.glob(f"*/{_NOTE}")):
        known, emulator = read_record(note), note.parent.name
        places = [Path(str(known.get("file"))), registry_file(registry, emulator)]
        found += [(emulator, place) for place in places if _is_that(place, known)][:1]
    return found


def _is_that(path: Path, known: dict[str, Any]) -> bool:
    """Whether a file is the registry that a note is about."""
    if "identity" not in known or not path.is_file():
        return False
    with Registry(path, write=False) as there:
        return there.identity() == known["identity"]


def _note(folder: Path, emulator: str) -> Path:
    return folder / emulator / _NOTE
