"""Plug-ins in the registry: versions, what each was made from, and what was revoked."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import scaleot_ray
from scaleot_ray.errors import ConfigError
from scaleot_ray.federation.rounds.registry.database import Database
from scaleot_ray.federation.rounds.registry.records import PlugIn, Submission, plug_in_of, submission_of
from scaleot_ray.federation.rounds.registry.rounds import Rounds


@dataclass(frozen=True)
class NewPlugIn:
    """A plug-in that lies in its folder.

    Attributes:
        name: its data owner, or :data:`~scaleot_ray.federation.rounds.registry.records.AGGREGATE`.
        digest, folder: of the delta's artefact; its folder, or its URI.
        settings: how it was made.
        made_from: the submissions that went into it.
    """

    name: str
    digest: str
    folder: str
    settings: dict[str, Any]
    made_from: Sequence[Submission]


class PlugIns:
    """Tables of plug-ins and lineage; see :class:`~scaleot_ray.federation.rounds.registry.registry.Registry`."""

    def __init__(self, database: Database, clock: Callable[[], float], rounds: Rounds) -> None:
        self._database, self._clock, self._rounds = database, clock, rounds

    def finish_round(self, number: int, results: Sequence[NewPlugIn]) -> None:
        """Ends a closed round with its results; once more with the same ones changes nothing.

        Raises:
            ConfigError: the round is open or failed, or it has other results already.
        """
        with self._database.writing():
            for new in results:
                self._add(number, new)
            self._rounds.finish(number)

    def replace(self, number: int, new: NewPlugIn, reason: str) -> PlugIn:
        """Revokes the version of a plug-in that is in force for a round, and puts another in its place."""
        with self._database.writing():
            self._revoke(new.name, number, reason)
            self._add(number, new)
        return next(found for found in self.of(new.name, number) if found.state == "active")

    def revoke(self, name: str, number: int, reason: str) -> None:
        """Revokes the version of a plug-in that is in force for a round, and puts nothing in its place."""
        with self._database.writing():
            self._revoke(name, number, reason)

    def all(self) -> list[PlugIn]:
        """Plug-ins of all versions, revoked ones too, by round."""
        return [plug_in_of(row) for row in self._database.rows("SELECT * FROM plug_ins ORDER BY round, name, version")]

    def of(self, name: str, number: int | None = None) -> list[PlugIn]:
        """All versions under a name, oldest first; of one round, or of all."""
        rows = self._database.rows("SELECT * FROM plug_ins WHERE name = ? ORDER BY version", name)
        return [found for found in map(plug_in_of, rows) if number is None or found.round == number]

    def in_force(self, name: str) -> PlugIn | None:
        """The plug-in of the latest round that has one under this name, and not a revoked one."""
        active = [found for found in self.of(name) if found.state == "active"]
        return max(active, key=lambda found: found.round, default=None)

    def made_from(self, plug_in: PlugIn) -> list[Submission]:
        """The submissions that went into a plug-in, by round and data owner."""
        rows = self._database.rows(
            "SELECT submissions.* FROM lineage JOIN submissions USING (round, tenant) "
            "WHERE name = ? AND version = ? ORDER BY round, tenant",
            plug_in.name,
            plug_in.version,
        )
        return [submission_of(row) for row in rows]

    def containing(self, tenant: str) -> list[PlugIn]:
        """The plug-ins in force that something of a data owner went into, its own and the aggregates, by round."""
        active = [found for found in self.all() if found.state == "active"]
        return [found for found in active if any(one.tenant == tenant for one in self.made_from(found))]

    def _add(self, number: int, new: NewPlugIn) -> None:
        active = next((found for found in self.of(new.name, number) if found.state == "active"), None)
        if active is not None and active.digest == new.digest:
            return
        if active is not None:
            raise ConfigError(
                f"Round {number} has another plug-in of {new.name} already ({active.digest[:12]}…).",
                "Replace it, which revokes the other.",
            )
        version = len(self.of(new.name)) + 1
        self._database.execute(
            "INSERT INTO plug_ins VALUES (?, ?, ?, ?, ?, 'active', NULL, ?, ?, ?)",
            new.name,
            version,
            number,
            new.digest,
            new.folder,
            json.dumps(new.settings),
            scaleot_ray.__version__,
            self._clock(),
        )
        for one in new.made_from:
            self._database.execute("INSERT INTO lineage VALUES (?, ?, ?, ?)", new.name, version, one.round, one.tenant)

    def _revoke(self, name: str, number: int, reason: str) -> None:
        self._database.execute(
            "UPDATE plug_ins SET state = 'revoked', reason = ? WHERE name = ? AND round = ? AND state = 'active'",
            reason,
            name,
            number,
        )
