"""Withdrawing all that came from a data owner; whatever cuts it short, it is gone on with."""

from __future__ import annotations

from scaleot_ray.federation.rounds.aggregates import Aggregates, remove_unused
from scaleot_ray.federation.rounds.artifact_store import ArtifactStore
from scaleot_ray.federation.rounds.earlier_emulators import EarlierEmulators
from scaleot_ray.federation.rounds.registry import Registry


class Revocations:
    """The revocations of a run: the registry says who is revoked, and here is done what follows from it.

    Args:
        registry, store, aggregates: of the present emulator.
        earlier: emulators that the run had before.
        staleness: rounds that a delta may be late by.
    """

    def __init__(
        self,
        registry: Registry,
        store: ArtifactStore,
        aggregates: Aggregates,
        earlier: EarlierEmulators,
        staleness: int,
    ) -> None:
        self._registry, self._store, self._aggregates = registry, store, aggregates
        self._earlier, self._staleness = earlier, staleness

    def finish(self) -> list[int]:
        """Does what is left of them on the present emulator; each may have been cut short.

        Returns:
            Rounds whose aggregate changed.

        Raises:
            ArtifactRefused: a delta in the store is damaged.
            ConfigError, ResourcesMissing: the store does not answer, or cannot be written; once more, it goes on from
                there.
        """
        reasons = self._reasons()
        if not reasons:
            return []
        rounds, plug_ins = self._registry.rounds, self._registry.plug_ins
        for found in rounds.all():
            for part in rounds.parts(found.number) if found.state != "finished" else ():
                if part.tenant in reasons and part.reason != reasons[part.tenant]:
                    rounds.withdraw(found.number, part.tenant, reasons[part.tenant])
        changed = self._aggregates.withdraw(reasons)
        for plug_in in plug_ins.all():
            if plug_in.name in reasons and plug_in.state == "active":
                plug_ins.revoke(plug_in.name, plug_in.round, reasons[plug_in.name])
        remove_unused(self._registry, self._store, self._staleness)
        return changed

    def finish_earlier(self) -> None:
        """Does the same on the emulators before; nothing that follows builds on them.

        Raises:
            ConfigError, ResourcesMissing: as :meth:`EarlierEmulators.revoke`.
        """
        for name, reason in self._reasons().items():
            self._earlier.revoke(name, reason)

    def _reasons(self) -> dict[str, str]:
        revoked = [one for one in self._registry.tenants.all() if one.state == "revoked"]
        return {one.name: f"{one.name} was revoked" + (f": {one.reason}" if one.reason else "") for one in revoked}
