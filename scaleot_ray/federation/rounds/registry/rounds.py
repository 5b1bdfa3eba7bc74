"""Rounds in the registry, and how far each data owner is in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from scaleot_ray.errors import ConfigError
from scaleot_ray.federation.rounds.registry.database import Database
from scaleot_ray.federation.rounds.registry.records import Part, PartState, Round, part_of, round_of
from scaleot_ray.federation.rounds.registry.tenants import Tenants


class Rounds:
    """Tables of rounds and parts; see :class:`~scaleot_ray.federation.rounds.registry.registry.Registry`."""

    def __init__(self, database: Database, clock: Callable[[], float], tenants: Tenants) -> None:
        self._database, self._clock, self._tenants = database, clock, tenants

    def open(
        self,
        emulator: str,
        tenants: Iterable[str],
        quorum: int,
        start: str | None = None,
        deadline: float | None = None,
    ) -> Round:
        """Opens the next round.

        Args:
            emulator: digest of the emulator.
            tenants: who takes part.
            quorum: submissions without which it fails.
            start: digest of the aggregate it begins with.
            deadline: seconds since 1970, UTC.

        Raises:
            ConfigError: a round is under way, the quorum is more than who takes part, or a data owner is
                unknown.
        """
        names, now = list(tenants), self._clock()
        with self._database.writing():
            current = self.current()
            if current is not None:
                raise ConfigError(f"Round {current.number} is still under way.", "Wait for its end.")
            self._check_quorum(quorum, len(names))
            for name in names:
                self._tenants.get(name)
            number = len(self.all()) + 1
            self._database.execute(
                "INSERT INTO rounds VALUES (?, ?, ?, ?, 'open', NULL, ?, ?, NULL)",
                number,
                emulator,
                start,
                quorum,
                now,
                deadline,
            )
            for name in names:
                self._join(number, name)
        return self.get(number)

    def get(self, number: int) -> Round:
        """A round by its number.

        Raises:
            ConfigError: there is none.
        """
        row = self._database.row("SELECT * FROM rounds WHERE number = ?", number)
        if row is None:
            raise ConfigError(f"There is no round {number}.", f"Rounds so far: {len(self.all())}.")
        return round_of(row)

    def all(self) -> list[Round]:
        """All rounds, in order."""
        return [round_of(row) for row in self._database.rows("SELECT * FROM rounds ORDER BY number")]

    def current(self) -> Round | None:
        """The round under way: open, or closed and not finished."""
        row = self._database.row("SELECT * FROM rounds WHERE state IN ('open', 'closed')")
        return round_of(row) if row else None

    def reopen(self, number: int, tenants: Iterable[str], quorum: int, deadline: float | None = None) -> Round:
        """Takes submissions again in a round that is open, or that failed; those it has still count.

        Args:
            number: of the latest round.
            tenants: who takes part from now on, besides those that have submitted.
            quorum: submissions without which it fails.
            deadline: seconds since 1970, UTC.

        Raises:
            ConfigError: it is closed or finished, or not the latest, or the quorum is more than who takes part.
        """
        names = set(tenants)
        with self._database.writing():
            current = self.get(number)
            if current.state not in ("open", "failed") or number != len(self.all()):
                raise ConfigError(f"Round {number} is {current.state}.", "Open the next round.")
            there = {part.tenant for part in self.parts(number) if part.state == "submitted"}
            self._check_quorum(quorum, len(names | there))
            for part in self.parts(number):
                if part.tenant not in names | there:  # what was withdrawn stays on record
                    self._database.execute(
                        "DELETE FROM parts WHERE round = ? AND tenant = ? AND NOT EXISTS "
                        "(SELECT 1 FROM submissions WHERE round = parts.round AND tenant = parts.tenant)",
                        number,
                        part.tenant,
                    )
            for name in sorted(names - {part.tenant for part in self.parts(number)}):
                self._join(number, name)
            self._database.execute(
                "UPDATE rounds SET state = 'open', reason = NULL, ended = NULL, quorum = ?, deadline = ? "
                "WHERE number = ?",
                quorum,
                deadline,
                number,
            )
        return self.get(number)

    def withdraw(self, number: int, tenant: str, reason: str) -> None:
        """Takes back what a data owner submitted in a round that has no result yet: it does not count any more."""
        with self._database.writing():
            if self.get(number).state != "finished":
                self._database.execute(
                    "UPDATE parts SET state = 'failed', reason = ?, changed = ? WHERE round = ? AND tenant = ?",
                    reason,
                    self._clock(),
                    number,
                    tenant,
                )

    def _join(self, number: int, name: str) -> None:
        self._database.execute(
            "INSERT INTO parts VALUES (?, ?, 'waiting', NULL, 0, ?, NULL)", number, name, self._clock()
        )

    @staticmethod
    def _check_quorum(quorum: int, count: int) -> None:
        if not 1 <= quorum <= count:
            raise ConfigError(
                f"rounds.quorum: {quorum} submissions are asked for, of {count} data owners.",
                f"Set it to between 1 and {count}."
                if count
                else "All are paused, cancelled or revoked: let one in again with `scaleot tenants --resume`, or "
                "add another to tenants.",
            )

    def begin_part(self, number: int, tenant: str, start_id: str | None = None) -> int:
        """Records that a data owner's tuning starts; gives how often it has by now.

        Args:
            number: of the round; one that is not open any more stays as it is.
            tenant: whose.
            start_id: of this start: the same one once more, from somebody who got no answer, counts once.
        """
        with self._database.writing():
            if self.get(number).state == "open":
                self._database.execute(
                    "UPDATE parts SET state = 'tuning', reason = NULL, attempts = attempts + 1, changed = ?, "
                    "start_id = ? WHERE round = ? AND tenant = ? AND state != 'submitted' "
                    "AND (start_id IS NULL OR start_id IS NOT ?)",
                    self._clock(),
                    start_id,
                    number,
                    tenant,
                    start_id,
                )
        return self.part(number, tenant).attempts

    def end_part(self, number: int, tenant: str, state: PartState, reason: str) -> None:
        """Records why nothing is to be expected of a data owner in a round; of one that has submitted, nothing."""
        with self._database.writing():
            self._database.execute(
                "UPDATE parts SET state = ?, reason = ?, changed = ? "
                "WHERE round = ? AND tenant = ? AND state != 'submitted'",
                state,
                reason,
                self._clock(),
                number,
                tenant,
            )

    def part(self, number: int, tenant: str) -> Part:
        """How far a data owner is in a round.

        Raises:
            ConfigError: it takes no part in it.
        """
        found = self.find_part(number, tenant)
        if found is None:
            raise ConfigError(f"{tenant} takes no part in round {number}.", "`scaleot status` lists who does.")
        return found

    def find_part(self, number: int, tenant: str) -> Part | None:
        """How far a data owner is in a round, if it takes part in it."""
        row = self._database.row("SELECT * FROM parts WHERE round = ? AND tenant = ?", number, tenant)
        return part_of(row) if row else None

    def parts(self, number: int) -> list[Part]:
        """Who takes part in a round, by name."""
        return [
            part_of(row) for row in self._database.rows("SELECT * FROM parts WHERE round = ? ORDER BY tenant", number)
        ]

    def close(self, number: int) -> Round:
        """Settles what counts: an open round takes no more submissions; of another one nothing changes.

        Who has submitted nothing is recorded as missing. With fewer submissions than its quorum the round
        fails, and its reason says who is not there and why.
        """
        with self._database.writing():
            current = self.get(number)
            if current.state != "open":
                return current
            self._database.execute(
                "UPDATE parts SET state = 'missing', reason = 'submitted nothing in time', changed = ? "
                "WHERE round = ? AND state IN ('waiting', 'tuning')",
                self._clock(),
                number,
            )
            absent = [part for part in self.parts(number) if part.state != "submitted"]
            there = len(self.parts(number)) - len(absent)
            if there >= current.quorum:
                self._database.execute("UPDATE rounds SET state = 'closed' WHERE number = ?", number)
            else:
                names = "; ".join(f"{part.tenant}: {part.reason or part.state}" for part in absent)
                self._end(number, "failed", f"{there} of the {current.quorum} submissions of its quorum ({names})")
        return self.get(number)

    def finish(self, number: int) -> None:
        """Ends a closed round, whose result is recorded; within a transaction.

        Raises:
            ConfigError: it is open, or it failed.
        """
        current = self.get(number)
        if current.state not in ("closed", "finished"):
            raise ConfigError(f"Round {number} is {current.state}.", "Only a round that is closed has a result.")
        self._end(number, "finished", None)

    def fail(self, number: int, reason: str) -> None:
        """Ends a round that is under way without a result."""
        with self._database.writing():
            self._end(number, "failed", reason)

    def _end(self, number: int, state: str, reason: str | None) -> None:
        self._database.execute(
            "UPDATE rounds SET state = ?, reason = ?, ended = ? WHERE number = ? AND state IN ('open', 'closed')",
            state,
            reason,
            self._clock(),
            number,
        )
