"""Rounds on one emulator: who takes part, what is let in, what becomes of it. All of it is on disk.

What the coordinator's actor does, as plain calls: nothing here knows of Ray, and nothing is kept in memory
that the registry and the artefact store do not have.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from scaleot_ray.artifacts.artifact import Artifact
from scaleot_ray.artifacts.audit import MODEL_OWNER, AuditLog, data_owner
from scaleot_ray.artifacts.crossing import cross
from scaleot_ray.artifacts.delta_gate import ANY_START
from scaleot_ray.artifacts.manifest import DeltaContent, Manifest
from scaleot_ray.artifacts.storage import read_artifact
from scaleot_ray.config import AggregationSettings, RoundSettings, TuneSettings
from scaleot_ray.errors import ArtifactRefused, ConfigError, ResourcesMissing
from scaleot_ray.federation.rounds.aggregates import Aggregates, NotAggregated, in_use
from scaleot_ray.federation.rounds.artifact_location import Location, open_store
from scaleot_ray.federation.rounds.earlier_emulators import EarlierEmulators
from scaleot_ray.federation.rounds.fit import Fit
from scaleot_ray.federation.rounds.intake import Intake, Sent
from scaleot_ray.federation.rounds.own_registry import check_own, note_own, registry_file
from scaleot_ray.federation.rounds.registry import (
    AGGREGATE,
    NewPlugIn,
    PlugIn,
    Registry,
    Round,
    Submission,
    TenantState,
    Withdrawal,
)
from scaleot_ray.federation.rounds.revocations import Revocations


class RoundKeeper:
    """Keeper of the rounds on one emulator; a context manager that closes the registry.

    Once it is open, revocations that were cut short are finished.

    Attributes:
        made_anew: rounds whose aggregate changed by that.

    Args:
        emulator: manifest of the emulator.
        place: where the emulator lies.
        folder: for deltas and aggregates, on any disk; where ``artifacts`` is another place, for those in use.
        registry: folder of the registry, on a disk of this machine.
        audit: log of what crosses.
        rounds, aggregation: sections of the run's settings.
        weights: of the data owners in the aggregate, by name; 1 for those that are not in it.
        artifacts: where deltas and aggregates are kept; default: where they have been so far, at first ``folder``.
        tunes: how each data owner of the run tunes, by name; default: nobody is known to tune otherwise than usual.

    Raises:
        ConfigError, ResourcesMissing: as :func:`~scaleot_ray.federation.rounds.own_registry.check_own`,
            :class:`~scaleot_ray.federation.rounds.registry.Registry` and
            :func:`~scaleot_ray.federation.rounds.artifact_location.open_store`.
    """

    def __init__(
        self,
        emulator: Manifest,
        place: Path,
        folder: Path,
        registry: Path,
        audit: AuditLog,
        rounds: RoundSettings,
        aggregation: AggregationSettings | None,
        weights: Mapping[str, float],
        artifacts: Location | None = None,
        tunes: Mapping[str, TuneSettings] | None = None,
    ) -> None:
        self.emulator, self.rounds, self.aggregation = emulator, rounds, aggregation
        self._audit, own = audit, emulator.digest()[:16]
        check_own(folder, registry, own)
        file = registry_file(registry, own)
        self.registry = Registry(file)
        try:
            note_own(folder, self.registry, file, own)
            self.registry.add_emulator(emulator, place)
            self._store = open_store(artifacts, self.registry, own, folder / own)
        except BaseException:
            self.registry.close()
            raise
        self._earlier = EarlierEmulators(folder, own, registry)
        self._aggregates = Aggregates(emulator, self.registry, self._store)
        self._revocations = Revocations(self.registry, self._store, self._aggregates, self._earlier, rounds.staleness)
        self._weights, self._fit = dict(weights), Fit(emulator, tunes or {})
        self._intake = Intake(emulator, self.registry, self._store, audit, rounds, weights, self._fit)
        self.made_anew: list[int] = []
        # Where it cannot be done, whoever revokes or restores what is damaged must get here all the same; no round
        # begins before it is done.
        with suppress(ArtifactRefused, ConfigError, ResourcesMissing):
            self.made_anew = self._revocations.finish()
        with suppress(ConfigError, ResourcesMissing):
            self._revocations.finish_earlier()

    def __enter__(self) -> RoundKeeper:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.registry.close()

    def admit(self, name: str, settings: dict[str, Any]) -> str | None:
        """Admits a data owner; gives the token its submissions must carry, None where it was cancelled or revoked.

        Whoever was on an emulator that the run had before is so on this one too.
        """
        known = self.registry.tenants.find(name)
        if known is not None and known.state in ("cancelled", "revoked"):
            return None
        token, before = self.registry.tenants.admit(name, settings), self._earlier.find(name)
        if before is not None and before.state in ("cancelled", "revoked"):
            self.registry.tenants.set_state(name, before.state, before.reason)
            return None
        return token

    def begin(self, names: Sequence[str]) -> Round | None:
        """The round to work on: one that an earlier run left open or that failed, or the next; None after the last.

        Without an aggregate rounds do not build on one another: every run begins one of its own, and one with an
        aggregate does not go on with what such a run left.

        Args:
            names: data owners of the run; who is not admitted (any more) does not take part.

        Raises:
            ConfigError: nobody is left to take part, or fewer than the quorum; or the round begins with an aggregate
                that this run's settings do not fit.
            ArtifactRefused, ResourcesMissing: as :meth:`finish_revocations`: what somebody revoked is part of is
                nothing to begin with.
        """
        self.finish_revocations()
        self.withdraw_misfits()
        rounds = self.registry.rounds
        current, past = rounds.current(), rounds.all()
        deadline = time.time() + self.rounds.deadline if self.rounds.deadline is not None else None
        taking = [name for name in names if self.registry.tenants.get(name).state == "admitted"]
        quorum = self.rounds.quorum if self.rounds.quorum is not None else max(len(taking), 1)
        if self.aggregation is None:
            if current is not None:
                rounds.fail(current.number, "the run that began it ended before it did")
        elif current is not None and current.state == "closed":
            self.end(current.number)
            return self.begin(names)
        elif past and past[-1].state in ("open", "failed") and not self._ignores_aggregate(past[-1]):
            self._check_start(past[-1].number, past[-1].start, taking)
            return rounds.reopen(past[-1].number, taking, quorum, deadline)
        else:
            if current is not None:
                rounds.fail(current.number, "a run without aggregation began it, and ended before it did")
            if len(self._aggregates.rounds()) >= self.rounds.count:
                return None
        start = self.registry.plug_ins.in_force(AGGREGATE) if self.aggregation is not None else None
        digest = start.digest if start is not None else None
        self._check_start(len(past) + 1, digest, taking)
        return rounds.open(self.emulator.digest(), taking, quorum, digest, deadline)

    def _ignores_aggregate(self, latest: Round) -> bool:
        """Whether a round begins with the emulator though there is an aggregate: a run without one began it."""
        return latest.start is None and self.registry.plug_ins.in_force(AGGREGATE) is not None

    def withdraw_misfits(self) -> list[Withdrawal]:
        """Takes out of a round that has no result yet what was not tuned as this run's settings say.

        Between two runs the settings may have changed: of deltas of another method or rank nothing can be made
        together with those that are still to come. Their data owners tune again. Weights are this run's too.

        Raises:
            ArtifactRefused, ResourcesMissing: one that counts cannot be read.
        """
        latest = next(reversed(self.registry.rounds.all()), None)
        if self.aggregation is None or latest is None or latest.state == "finished":
            return []
        self.registry.submissions.reweigh(latest.number, self._weights)
        found = []
        for one in self._counted(latest.number):
            content = self._store.manifest(one.digest).content
            assert isinstance(content, DeltaContent)  # Manifest ties content to kind
            problem = self._fit.problem(one.tenant, content)
            if problem is not None:
                reason = f"its delta does not count any more: {problem}"
                found.append(self.registry.submissions.withdraw(one, reason))
        used = in_use(self.registry, self.rounds.staleness)
        for digest in {one.digest for one in found} - used:
            self._store.remove(digest)
        return found

    def _check_start(self, number: int, start: str | None, names: Sequence[str]) -> None:
        """Whether the data owners can begin a round with what it begins with."""
        if start is None:
            return
        content = self._store.manifest(start).content
        assert isinstance(content, DeltaContent)  # Manifest ties content to kind
        for name in names:
            problem = self._fit.problem(name, content)
            if problem is not None:
                raise ConfigError(
                    f"tune: round {number} begins with the aggregate of the rounds before, which {name} cannot go on "
                    f"with: {problem}.",
                    "Set it back to what the rounds before were tuned with, or begin a new run in another output.",
                )

    def is_last(self, number: int) -> bool:
        """Whether no round follows this one in the run; without an aggregate, none ever does."""
        return self.aggregation is None or len(self._aggregates.rounds() | {number}) >= self.rounds.count

    def taking_part(self, number: int) -> dict[str, bool]:
        """Who takes part in a round, and whether it has submitted; of those that are not admitted, who has."""
        admitted = {one.name for one in self.registry.tenants.all() if one.state == "admitted"}
        return {
            part.tenant: part.state == "submitted"
            for part in self.registry.rounds.parts(number)
            if part.state == "submitted" or part.tenant in admitted
        }

    def start(self, number: int, recipient: str) -> Artifact | None:
        """The aggregate that a round begins with, on its way to a data owner; None for the emulator as it is."""
        digest = self.registry.rounds.get(number).start
        return self._on_its_way(digest, data_owner(recipient)) if digest is not None else None

    def begin_part(self, number: int, tenant: str, start_id: str | None = None) -> int:
        """Records that a data owner's tuning starts; see :meth:`~.registry.rounds.Rounds.begin_part`."""
        return self.registry.rounds.begin_part(number, tenant, start_id)

    def leave_out(self, number: int, tenant: str, reason: str) -> None:
        """Records that nothing is to be expected of a data owner in a round any more, and why."""
        self.registry.rounds.end_part(number, tenant, "failed", reason)

    def take(self, sent: Sent) -> Submission | None:
        """Takes what a data owner sends; see :meth:`Intake.take`."""
        return self._intake.take(sent, self._between_rounds())

    def _between_rounds(self) -> bool:
        """Whether a round has its result, or is about to get it, and another one will follow it in this run."""
        past = self.registry.rounds.all()
        return bool(past) and past[-1].state in ("closed", "finished") and not self.is_last(past[-1].number)

    def end(self, number: int) -> Round:
        """Closes a round and makes its plug-ins, unless it stays below its quorum; again, it changes nothing.

        Raises:
            NotAggregated: as :meth:`Aggregates.make`; the round has failed then, so that with other settings, or with
                more data owners, it goes on.
            ArtifactRefused: a delta that counts is damaged.
            ConfigError, ResourcesMissing: the store cannot be read or written; the round stays closed.
        """
        self._intake.write_refusals()
        current = self.registry.rounds.close(number)
        if current.state == "closed":
            counted = self._counted(number)
            if len(counted) < current.quorum:  # someone was revoked who had submitted
                self.registry.rounds.fail(number, f"{len(counted)} of the {current.quorum} submissions of its quorum")
                return self.registry.rounds.get(number)
            results = [NewPlugIn(one.tenant, one.digest, one.folder, one.settings, [one]) for one in counted]
            if self.aggregation is not None:
                try:
                    results.append(self._aggregates.make(number, counted, self.aggregation))
                except NotAggregated as error:
                    self.registry.rounds.fail(number, error.problem)
                    raise
            self.registry.plug_ins.finish_round(number, results)
            self._store.release({one.digest for one in results})
        return self.registry.rounds.get(number)

    def _counted(self, number: int) -> list[Submission]:
        revoked = {one.name for one in self.registry.tenants.all() if one.state == "revoked"}
        return [one for one in self.registry.submissions.of_round(number) if one.tenant not in revoked]

    def set_state(self, tenant: str, state: TenantState, reason: str) -> None:
        """Pauses or cancels a data owner, or lets one that was paused take part again.

        Raises:
            ConfigError: there is no such data owner, or it was cancelled or revoked before.
        """
        self.registry.tenants.set_state(tenant, state, reason)

    def revoke(self, tenant: str, reason: str) -> list[int]:
        """Withdraws all that came from a data owner: its plug-ins, and its part in every aggregate.

        Aggregates that it was in are made anew without it, and those of later rounds on top of them: of the
        others' deltas counts how far each came from where it began. That they began with something it was part
        of is not undone. Its deltas are removed, and the old aggregates once nothing in force began with them. On
        emulators that the run had before, aggregates that it was in are withdrawn as a whole.

        Returns:
            Rounds whose aggregate changed; once more, none.

        Raises:
            ConfigError: there is no such data owner; or, as ResourcesMissing, the store cannot be written.
            ArtifactRefused: a delta on disk is damaged.
        """
        if self.registry.tenants.find(tenant) is None and self._earlier.find(tenant) is not None:
            self.registry.tenants.admit(tenant, {})
        self.registry.tenants.set_state(tenant, "revoked", reason)
        changed = self._revocations.finish()
        self._revocations.finish_earlier()
        return changed

    def finish_revocations(self) -> list[int]:
        """Does what is left of revocations that were cut short; see :meth:`Revocations.finish`."""
        return self._revocations.finish()

    def submitted(self, tenant: str, number: int | None = None) -> Submission | None:
        """What a data owner submitted in a round, or last; None of one that was revoked."""
        known = self.registry.tenants.find(tenant)
        if known is not None and known.state == "revoked":
            return None
        found = self.registry.submissions.of_tenant(tenant)
        return next((one for one in reversed(found) if number in (None, one.round)), None)

    def in_common(self) -> PlugIn | None:
        """The aggregate of the latest round that has one."""
        return self.registry.plug_ins.in_force(AGGREGATE)

    def delta(self, digest: str, recipient: str) -> Artifact:
        """A delta that was submitted, or an aggregate, on its way to someone; recorded as a crossing."""
        return self._on_its_way(digest, recipient)

    def _on_its_way(self, digest: str, recipient: str) -> Artifact:
        # The gate verifies.
        artifact = read_artifact(self._store.fetch(digest), expected_kind="delta", verify=False)
        cross(artifact, MODEL_OWNER, recipient, self._audit, parent=self.emulator, start=ANY_START)
        return artifact
