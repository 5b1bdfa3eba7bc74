"""What an administrator asks of a run: who is paused, let in again, cancelled or revoked.

A registry has one writer. While a run is under way that is its coordinator, so what is asked goes through a
folder that the run's driver looks into; when none is, whoever asks holds the run's folder and does it.
"""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from scaleot_ray.artifacts.audit import AuditLog
from scaleot_ray.artifacts.manifest import Manifest
from scaleot_ray.artifacts.storage import read_manifest
from scaleot_ray.config import RoundSettings
from scaleot_ray.errors import ArtifactRefused, ConfigError, ResourcesMissing, RunFailed, ScaleOTError
from scaleot_ray.federation.folder import FolderHeld, RunFolder
from scaleot_ray.federation.rounds.round_keeper import RoundKeeper
from scaleot_ray.stages.record import read_record, write_record

Action = Literal["pause", "resume", "cancel", "revoke"]

_STATES = {"pause": "paused", "resume": "admitted", "cancel": "cancelled"}
_LOOK_SECONDS = 0.2

# How an answer names what is wrong; whoever asked exits with the code of its own.
_ERRORS: dict[str, type[ScaleOTError]] = {
    "config": ConfigError,
    "refused": ArtifactRefused,
    "resources": ResourcesMissing,
    "failed": RunFailed,
}


@dataclass(frozen=True)
class Request:
    """What is asked.

    Attributes:
        action: ``pause``: starts nothing new; ``resume``: takes part again; ``cancel``: takes no further part, what
            it submitted counts; ``revoke``: what it submitted is withdrawn.
        tenant: the data owner.
        reason: why, for the registry.
    """

    action: Action
    tenant: str
    reason: str


def carry_out(request: Request, keeper: RoundKeeper) -> list[int]:
    """Does what is asked; gives the rounds whose aggregate changed.

    Raises:
        ConfigError: there is no such data owner, or it was cancelled or revoked before.
        ArtifactRefused: a delta that an aggregate is made of is damaged.
        ResourcesMissing: where artefacts are kept does not answer; asked once more, it goes on.
    """
    if request.action == "revoke":
        return keeper.revoke(request.tenant, request.reason)
    keeper.set_state(request.tenant, _STATES[request.action], request.reason)  # type: ignore[arg-type]
    return []


def administer(folder: RunFolder, request: Request, seconds: float = 300.0) -> list[int]:
    """Does what is asked of a run, whether it is under way or not; gives the rounds whose aggregate changed.

    Args:
        folder: the run's.
        request: what is asked.
        seconds: to wait for the answer of a run that is under way.

    Raises:
        ConfigError: no run has been here, or none that came to its emulator, or as :func:`carry_out`.
        ArtifactRefused, ResourcesMissing: as :func:`carry_out`.
        RunFailed: the run that is under way does not answer, or could not do it for another reason.
    """
    registry = registry_of(folder)
    try:
        with folder.held():
            emulator = emulator_of(folder)
            audit = AuditLog(folder.audit)
            with RoundKeeper(
                emulator, folder.emulator, folder.coordinator, registry, audit, RoundSettings(), None, {}
            ) as keeper:
                return carry_out(request, keeper)
    except FolderHeld:
        return _ask(folder, request, seconds)


def registry_of(folder: RunFolder) -> Path:
    """Folder of a run's registry.

    Raises:
        ConfigError: no run has been here.
    """
    noted = read_record(folder.coordinator / "registry.json").get("registry")
    if noted is None:
        raise ConfigError(f"{folder.path}: no run with data owners has been here.", "Give the folder of a run.")
    return Path(noted)


def emulator_of(folder: RunFolder) -> Manifest:
    """Manifest of a run's emulator.

    Raises:
        ConfigError: there is none yet.
        ArtifactRefused: it is damaged.
    """
    if not folder.emulator.exists():
        raise ConfigError(f"{folder.path}: there is no emulator yet.", "Wait until the model owner has built it.")
    return read_manifest(folder.emulator)


def registry_place(folder: RunFolder, registry: str | None) -> Path:
    """Folder of the registry of a run whose setting ``registry`` this is."""
    return Path(registry).expanduser().absolute() if registry is not None else folder.coordinator


def note_registry(folder: RunFolder, registry: str | None) -> Path:
    """Notes where a run's registry is, for whoever asks later; requests that nobody answered before are dropped."""
    place = registry_place(folder, registry)
    write_record(folder.coordinator / "registry.json", {"registry": str(place)})
    for path in folder.requests.glob("*.json"):
        path.unlink(missing_ok=True)
    return place


def pending(folder: RunFolder) -> list[tuple[str, Request]]:
    """What is asked of a run that is under way, oldest first, with the name to answer to; each is given once."""
    found = []
    for path in folder.requests.glob("*.ask.json"):
        try:
            asked = path.stat().st_mtime_ns
        except FileNotFoundError:  # whoever asked has given up meanwhile
            continue
        values = read_record(path)
        path.unlink(missing_ok=True)
        if values.keys() == {"action", "tenant", "reason"}:
            found.append((asked, path.name.removesuffix(".ask.json"), Request(**values)))
    return [(name, request) for _, name, request in sorted(found, key=lambda one: one[:2])]


def reply(folder: RunFolder, name: str, changed: list[int] | ScaleOTError) -> None:
    """Tells whoever asked what came of it."""
    values: dict[str, Any] = {"changed": changed}
    if isinstance(changed, ScaleOTError):
        kind = next((name for name, known in _ERRORS.items() if isinstance(changed, known)), "failed")
        values = {"error": kind, "problem": changed.problem, "remedy": changed.remedy}
    write_record(folder.requests / f"{name}.answer.json", values)


def _ask(folder: RunFolder, request: Request, seconds: float) -> list[int]:
    name = secrets.token_hex(8)
    write_record(folder.requests / f"{name}.ask.json", asdict(request))
    path, deadline = folder.requests / f"{name}.answer.json", time.monotonic() + seconds
    while not path.exists():
        if not folder.is_held():  # it has ended meanwhile
            (folder.requests / f"{name}.ask.json").unlink(missing_ok=True)
            return administer(folder, request, max(deadline - time.monotonic(), 1.0))
        if time.monotonic() > deadline:
            (folder.requests / f"{name}.ask.json").unlink(missing_ok=True)
            raise RunFailed(
                f"{folder.path}: the run that is under way did not answer within {seconds:g} seconds.",
                "Look at it with `scaleot status`; if its process is gone, ask once more.",
            )
        time.sleep(_LOOK_SECONDS)
    values = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    if "problem" in values:
        raise _ERRORS[values["error"]](values["problem"], values["remedy"])
    return list(values["changed"])
