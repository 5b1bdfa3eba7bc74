"""Emulators that a run had before its present one: who was excluded there, and what is left there of a data owner.

Rounds on another emulator have a registry of their own. Whoever was cancelled or revoked in a run stays so when its
emulator is built anew, and a revocation withdraws what came from a data owner on all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from scaleot_ray.federation.rounds.aggregates import remove_unused, unused
from scaleot_ray.federation.rounds.artifact_location import open_store
from scaleot_ray.federation.rounds.artifact_store import ArtifactStore
from scaleot_ray.federation.rounds.own_registry import known_registries
from scaleot_ray.federation.rounds.registry import AGGREGATE, Registry, Tenant


class EarlierEmulators:
    """What a run's folder has of them.

    Args:
        folder: of the run's coordinator.
        present: the start of the present emulator's digest.
        registry: folder of the registry, as the run's settings say.
    """

    def __init__(self, folder: Path, present: str, registry: Path) -> None:
        self._folder, self._present, self._registry = folder, present, registry

    def find(self, name: str) -> Tenant | None:
        """A data owner of theirs: as it was excluded, if it was on one of them."""
        found = None
        for _, path in self._registries():
            with Registry(path, write=False) as registry:
                tenant = registry.tenants.find(name)
            if tenant is not None and (found is None or tenant.state in ("cancelled", "revoked")):
                found = tenant
        return found

    def revoke(self, name: str, reason: str) -> None:
        """Withdraws all that came from a data owner, or what is left of it; once more, it changes nothing.

        An aggregate that it was in, and those that began with one, are withdrawn as a whole: without their emulator
        they cannot be made anew.

        Args:
            name: of the data owner.
            reason: as the registries shall have it.

        Raises:
            ConfigError, ResourcesMissing: as :func:`~scaleot_ray.federation.rounds.artifact_location.open_store`.
        """
        for emulator, path in self._registries():
            with Registry(path, write=False) as registry:
                left = self._is_left(emulator, registry, name)
            if left:
                self._revoke(emulator, path, name, reason)

    def _is_left(self, emulator: str, registry: Registry, name: str) -> bool:
        """Whether a data owner was not revoked there, or its revocation was cut short."""
        tenant = registry.tenants.find(name)
        if tenant is None:
            return False
        if tenant.state != "revoked" or _lasting(registry, name):
            return True
        return bool(unused(registry, self._store(emulator, registry)))

    def _store(self, emulator: str, registry: Registry) -> ArtifactStore:
        return open_store(None, registry, emulator, self._folder / emulator)

    def _revoke(self, emulator: str, path: Path, name: str, reason: str) -> None:
        with Registry(path) as registry:
            registry.tenants.set_state(name, "revoked", reason)
            for plug_in in _lasting(registry, name):
                registry.plug_ins.revoke(*plug_in, reason)
            remove_unused(registry, self._store(emulator, registry))

    def _registries(self) -> Iterator[tuple[str, Path]]:
        """Start of the digest and registry of each emulator but the present one."""
        known = known_registries(self._folder, self._registry)
        return ((emulator, path) for emulator, path in known if emulator != self._present)


def _lasting(registry: Registry, name: str) -> list[tuple[str, int]]:
    """Plug-ins in force, by name and round, that came from a data owner, or began with such a one."""
    active = [one for one in registry.plug_ins.all() if one.state == "active"]
    aggregates = [one for one in active if one.name == AGGREGATE]
    parts = {one.round: {part.tenant for part in registry.plug_ins.made_from(one)} for one in aggregates}
    first = min((number for number, tenants in parts.items() if name in tenants), default=None)
    own = [(one.name, one.round) for one in active if one.name == name]
    return own + [(AGGREGATE, one.round) for one in aggregates if first is not None and one.round >= first]
