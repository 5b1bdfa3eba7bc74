"""Submissions in the registry: each counts once, in one round, whatever is sent twice, late or again."""

from __future__ import annotations

import json
from collections.abc import Callable

from scaleot_ray.errors import ArtifactRefused
from scaleot_ray.federation.registry.database import Database
from scaleot_ray.federation.registry.records import NewSubmission, Submission, submission_of
from scaleot_ray.federation.registry.rounds import Rounds


class Submissions:
    """Table of submissions; see :class:`~scaleot_ray.federation.registry.registry.Registry`."""

    def __init__(self, database: Database, clock: Callable[[], float], rounds: Rounds) -> None:
        self._database, self._clock, self._rounds = database, clock, rounds

    def find(self, tenant: str, digest: str, tuned_round: int, staleness: int = 0) -> Submission | None:
        """The submission that was acknowledged before; None where this one is new and a round takes it.

        Args:
            tenant: whose.
            digest: of the delta's artefact.
            tuned_round: the round it was tuned in.
            staleness: rounds that it may be late by.

        Raises:
            ArtifactRefused: the same delta was submitted in another round or by another data owner, this
                data owner has submitted another one, or no round takes it any more.
        """
        before = self._by_digest(digest)
        if before is not None:
            if (before.tenant, before.tuned_round) == (tenant, tuned_round):
                return before
            # Not by whom: that would tell one data owner something of another.
            when = f" in round {before.tuned_round}" if before.tenant == tenant else ""
            raise ArtifactRefused(
                f"the delta {digest[:12]}… was submitted before{when}.", "Submit what was tuned in this round."
            )
        current = self._rounds.current()
        if current is None or current.state != "open":
            raise ArtifactRefused(f"round {tuned_round} is closed.", "Wait for the next round, or begin a new run.")
        if not current.number - staleness <= tuned_round <= current.number:
            oldest = max(current.number - staleness, 1)
            raise ArtifactRefused(
                f"it was tuned in round {tuned_round}, but round {current.number} takes nothing older than round "
                f"{oldest}.",
                "Tune again on what the current round begins with, or raise rounds.staleness.",
            )
        part = self._rounds.find_part(current.number, tenant)
        if part is None:
            raise ArtifactRefused(f"{tenant} takes no part in round {current.number}.", "Wait for one that it is in.")
        if part.state == "submitted":
            raise ArtifactRefused(
                f"{tenant} has submitted another delta in round {current.number}.", "The first one counts."
            )
        return None

    def add(self, new: NewSubmission, staleness: int = 0) -> Submission:
        """Counts a delta in the round that is open; one that counts already is not counted again.

        Returns:
            What is on the disk now, and may be acknowledged.

        Raises:
            ArtifactRefused: as :meth:`find`.
        """
        with self._database.writing():
            before = self.find(new.tenant, new.digest, new.tuned_round, staleness)
            if before is not None:
                return before
            current, now = self._rounds.current(), self._clock()
            assert current is not None  # find has seen it
            self._database.execute(
                "INSERT INTO submissions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                current.number,
                new.tenant,
                new.tuned_round,
                new.digest,
                str(new.folder),
                new.bytes,
                new.norm,
                new.weight,
                json.dumps(new.metrics),
                now,
            )
            self._database.execute(
                "UPDATE parts SET state = 'submitted', reason = NULL, changed = ? WHERE round = ? AND tenant = ?",
                now,
                current.number,
                new.tenant,
            )
        counted = self._by_digest(new.digest)
        assert counted is not None  # just written
        return counted

    def of_round(self, number: int) -> list[Submission]:
        """What counts in a round, by data owner."""
        rows = self._database.rows("SELECT * FROM submissions WHERE round = ? ORDER BY tenant", number)
        return [submission_of(row) for row in rows]

    def of_tenant(self, tenant: str) -> list[Submission]:
        """What a data owner has submitted, by round."""
        rows = self._database.rows("SELECT * FROM submissions WHERE tenant = ? ORDER BY round", tenant)
        return [submission_of(row) for row in rows]

    def _by_digest(self, digest: str) -> Submission | None:
        row = self._database.row("SELECT * FROM submissions WHERE digest = ?", digest)
        return submission_of(row) if row else None
