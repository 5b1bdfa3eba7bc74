"""Submissions in the registry: each counts once, in one round, whatever is sent twice, late or again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from scaleot_ray.errors import ArtifactRefused, ConfigError
from scaleot_ray.federation.rounds.registry.database import Database
from scaleot_ray.federation.rounds.registry.records import (
    NewSubmission,
    Submission,
    Withdrawal,
    submission_of,
    withdrawal_of,
)
from scaleot_ray.federation.rounds.registry.rounds import Rounds


class Submissions:
    """Table of submissions; see :class:`~scaleot_ray.federation.rounds.registry.registry.Registry`."""

    def __init__(self, database: Database, clock: Callable[[], float], rounds: Rounds) -> None:
        self._database, self._clock, self._rounds = database, clock, rounds

    def find(self, tenant: str, digest: str, tuned_round: int, staleness: int = 0) -> Submission | None:
        """The submission that was acknowledged before; None where this one is new and a round takes it.

        Whoever begins a round as it began an earlier one may come to the very same delta again, and submit it
        in that round too. Nor does it matter what others sent: of the same rows come the same deltas.

        Args:
            tenant: whose.
            digest: of the delta's artefact.
            tuned_round: the round it was tuned in.
            staleness: rounds that it may be late by.

        Raises:
            ArtifactRefused: this data owner submitted the same delta in a round that began otherwise, or another
                one in this round, or no round takes it any more.
        """
        before = self._alike(tenant, digest)
        acknowledged = self.acknowledged(tenant, digest, tuned_round)
        if acknowledged is not None:
            return acknowledged
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
        for one in before:
            if self._rounds.get(one.tuned_round).start != self._rounds.get(tuned_round).start:
                raise ArtifactRefused(
                    f"the delta {digest[:12]}… was submitted before in round {one.tuned_round}.",
                    "Submit what was tuned in this round.",
                )
        part = self._rounds.find_part(current.number, tenant)
        if part is None:
            raise ArtifactRefused(f"{tenant} takes no part in round {current.number}.", "Wait for one that it is in.")
        if part.state == "submitted":
            raise ArtifactRefused(
                f"{tenant} has submitted another delta in round {current.number}.", "The first one counts."
            )
        return None

    def acknowledged(self, tenant: str, digest: str, tuned_round: int) -> Submission | None:
        """The submission of a delta of that round that was acknowledged before, if it was."""
        return next((one for one in self._alike(tenant, digest) if one.tuned_round == tuned_round), None)

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
                "INSERT INTO submissions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                current.number,
                new.tenant,
                new.tuned_round,
                new.digest,
                new.folder,
                new.bytes,
                new.norm,
                new.weight,
                json.dumps(new.metrics),
                new.data_digest,
                now,
                json.dumps(new.settings),
                new.code_version,
            )
            self._database.execute(
                "UPDATE parts SET state = 'submitted', reason = NULL, changed = ? WHERE round = ? AND tenant = ?",
                now,
                current.number,
                new.tenant,
            )
            if new.tuned_round != current.number:
                self._database.execute(
                    "UPDATE parts SET state = 'late', reason = ?, changed = ? "
                    "WHERE round = ? AND tenant = ? AND state != 'submitted'",
                    f"counts in round {current.number}",
                    now,
                    new.tuned_round,
                    new.tenant,
                )
        return next(one for one in self._alike(new.tenant, new.digest) if one.round == current.number)

    def withdraw(self, one: Submission, reason: str) -> Withdrawal:
        """Takes a submission out of a round that has no result yet; its data owner may submit another there.

        Raises:
            ConfigError: the round is finished, so plug-ins were made from it.
        """
        with self._database.writing():
            if self._rounds.get(one.round).state == "finished":
                raise ConfigError(f"Round {one.round} is finished.", "Revoke the data owner instead.")
            key, now = (one.round, one.tenant), self._clock()
            self._database.execute("DELETE FROM submissions WHERE round = ? AND tenant = ?", *key)
            self._database.execute(
                "UPDATE parts SET state = 'failed', reason = ?, changed = ? WHERE round = ? AND tenant = ?",
                reason,
                now,
                *key,
            )
            self._database.execute("INSERT INTO withdrawals VALUES (?, ?, ?, ?, ?)", *key, one.digest, reason, now)
        return Withdrawal(one.round, one.tenant, one.digest, reason, now)

    def withdrawals(self) -> list[Withdrawal]:
        """What was taken out of rounds, oldest first."""
        return [withdrawal_of(row) for row in self._database.rows("SELECT * FROM withdrawals ORDER BY rowid")]

    def reweigh(self, number: int, weights: Mapping[str, float]) -> None:
        """Gives the submissions of a round that has no result yet the weights that the settings say by now."""
        with self._database.writing():
            for tenant, weight in weights.items():
                self._database.execute(
                    "UPDATE submissions SET weight = ? WHERE round = ? AND tenant = ?", weight, number, tenant
                )

    def of_round(self, number: int) -> list[Submission]:
        """What counts in a round, by data owner."""
        rows = self._database.rows("SELECT * FROM submissions WHERE round = ? ORDER BY tenant", number)
        return [submission_of(row) for row in rows]

    def of_tenant(self, tenant: str) -> list[Submission]:
        """What a data owner has submitted, by round."""
        rows = self._database.rows("SELECT * FROM submissions WHERE tenant = ? ORDER BY round", tenant)
        return [submission_of(row) for row in rows]

    def _alike(self, tenant: str, digest: str) -> list[Submission]:
        rows = self._database.rows(
            "SELECT * FROM submissions WHERE tenant = ? AND digest = ? ORDER BY round", tenant, digest
        )
        return [submission_of(row) for row in rows]
