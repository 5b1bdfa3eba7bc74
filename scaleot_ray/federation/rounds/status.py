"""How far a run is, read from its registry: while it is under way, and after it."""

from __future__ import annotations

from typing import Any

from scaleot_ray.federation.folder import RunFolder
from scaleot_ray.federation.rounds.administration import emulator_of, registry_of
from scaleot_ray.federation.rounds.own_registry import check_own, registry_file
from scaleot_ray.federation.rounds.registry import AGGREGATE, PlugIn, Registry

SCHEMA = "scaleot.status/1"


def run_status(folder: RunFolder) -> dict[str, Any]:
    """The status of a run as plain values; see docs/json.md.

    Raises:
        ConfigError: no run has been here, or none that came to its first round.
        ArtifactRefused: the emulator in the folder is damaged.
    """
    place = registry_of(folder)
    digest = emulator_of(folder).digest()
    check_own(folder.coordinator, place, digest[:16])
    with Registry(registry_file(place, digest[:16]), write=False) as registry:
        aggregated = {one.round for one in registry.plug_ins.of(AGGREGATE) if one.state == "active"}
        return {
            "schema": SCHEMA,
            "directory": str(folder.path),
            "under_way": folder.is_held(),
            "emulator": digest,
            "rounds": [
                {
                    "number": one.number,
                    "state": one.state,
                    "reason": one.reason,
                    "quorum": one.quorum,
                    "opened": one.opened,
                    "deadline": one.deadline,
                    "ended": one.ended,
                    "aggregated": one.number in aggregated,
                    "tenants": [
                        {"name": part.tenant, "state": part.state, "reason": part.reason, "attempts": part.attempts}
                        for part in registry.rounds.parts(one.number)
                    ],
                }
                for one in registry.rounds.all()
            ],
            "tenants": [
                {
                    "name": one.name,
                    "state": one.state,
                    "reason": one.reason,
                    "submissions": len(registry.submissions.of_tenant(one.name)),
                    "refusals": _refusals(registry, one.name),
                    "plug_in": _plug_in(registry.plug_ins.in_force(one.name)),
                }
                for one in registry.tenants.all()
            ],
            "refusals": _refusals(registry, None),
            "aggregate": _plug_in(registry.plug_ins.in_force(AGGREGATE)),
        }


def _refusals(registry: Registry, sender: str | None) -> list[dict[str, Any]]:
    return [{"reason": why, "count": count} for why, count in registry.tenants.refusals(sender)]


def _plug_in(found: PlugIn | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {"round": found.round, "version": found.version, "digest": found.digest, "directory": found.folder}
