"""Rounds on one emulator: who takes part, what is let in, what becomes of it. All of it is on disk.

What the coordinator's actor does, as plain calls: nothing here knows of Ray, and nothing is kept in memory
that the registry and the folders beside it do not have.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from scaleot_ray.artifacts.artifact import Artifact
from scaleot_ray.artifacts.audit import MODEL_OWNER, AuditLog, data_owner
from scaleot_ray.artifacts.crossing import cross
from scaleot_ray.artifacts.delta_gate import ANY_START
from scaleot_ray.artifacts.manifest import DeltaContent, Kind, Manifest, MetricsContent
from scaleot_ray.artifacts.storage import read_artifact, read_manifest, write_artifact
from scaleot_ray.config import AggregationSettings, RoundSettings
from scaleot_ray.errors import ArtifactRefused, ConfigError
from scaleot_ray.federation.registry import (
    AGGREGATE,
    NewPlugIn,
    NewSubmission,
    PlugIn,
    Registry,
    Round,
    Submission,
    TenantState,
)
from scaleot_ray.plugin.aggregation import ServerState, aggregate, contributions

REFUSALS_READ = 100
"""Refused submissions of one sender, after which nothing more of it is looked at: checking costs time."""


@dataclass(frozen=True)
class Sent:
    """What a data owner sends at the end of its tuning.

    Attributes:
        tenant: who it says it is.
        token: what it was given when it was admitted.
        round: it was tuned in.
        delta, metrics: give the artefacts, or raise what is wrong with their form.
        data_digest: HMAC of its data under its own key.
    """

    tenant: str
    token: str
    round: int
    delta: Callable[[], Artifact]
    metrics: Callable[[], Artifact]
    data_digest: str | None = None


class RoundKeeper:
    """Keeper of the rounds on one emulator; a context manager that closes the registry.

    Args:
        emulator: manifest of the emulator.
        place: where the emulator lies.
        folder: for deltas and aggregates, on any disk.
        registry: folder of the registry, on a disk of this machine.
        audit: log of what crosses.
        rounds, aggregation: sections of the run's settings.
        weights: of the data owners in the aggregate, by name; 1 for those that are not in it.

    Raises:
        ConfigError, ResourcesMissing: as :class:`~scaleot_ray.federation.registry.Registry`.
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
    ) -> None:
        self.emulator, self.rounds, self.aggregation = emulator, rounds, aggregation
        self._audit, self._weights = audit, dict(weights)
        self._folder = folder / emulator.digest()[:16]
        self.registry = Registry(registry / emulator.digest()[:16] / "registry.sqlite")
        self.registry.add_emulator(emulator, place)
        self._refused: dict[str, int] = {}

    def __enter__(self) -> RoundKeeper:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.registry.close()

    def admit(self, name: str, settings: dict[str, Any]) -> str | None:
        """Admits a data owner; gives the token its submissions must carry, None where it was cancelled or revoked."""
        known = self.registry.tenants.find(name)
        if known is not None and known.state in ("cancelled", "revoked"):
            return None
        return self.registry.tenants.admit(name, settings)

    def begin(self, names: Sequence[str]) -> Round | None:
        """The round to work on: one that an earlier run left open or that failed, or the next; None after the last.

        Without an aggregate rounds do not build on one another: every run begins one of its own.

        Args:
            names: data owners of the run; who is not admitted (any more) does not take part.

        Raises:
            ConfigError: nobody is left to take part, or fewer than the quorum.
        """
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
        elif past and past[-1].state in ("open", "failed"):
            return rounds.reopen(past[-1].number, taking, quorum, deadline)
        elif len(self._aggregated()) >= self.rounds.count:
            return None
        start = self.registry.plug_ins.in_force(AGGREGATE) if self.aggregation is not None else None
        digest = start.digest if start is not None else None
        return rounds.open(self.emulator.digest(), taking, quorum, digest, deadline)

    def is_last(self, number: int) -> bool:
        """Whether no round follows this one in the run; without an aggregate, none ever does."""
        return self.aggregation is None or len(self._aggregated() | {number}) >= self.rounds.count

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

    def begin_part(self, number: int, tenant: str) -> int:
        """Records that a data owner's tuning starts; gives how often it has in this round."""
        return self.registry.rounds.begin_part(number, tenant)

    def leave_out(self, number: int, tenant: str, reason: str) -> None:
        """Records that nothing is to be expected of a data owner in a round any more, and why."""
        self.registry.rounds.end_part(number, tenant, "failed", reason)

    def take(self, sent: Sent) -> Submission:
        """Takes what a data owner sends through the gate into the registry; sent twice, it counts once.

        Returns:
            The submission, which is on the disk now.

        Raises:
            ArtifactRefused: the data owner is not admitted or its token is wrong, one of the artefacts is not
                what it says or not what may cross, or no round takes it; audit log and registry say so too.
        """
        if self._refused.get(sent.tenant, 0) >= REFUSALS_READ:
            raise ArtifactRefused(
                f"{REFUSALS_READ} submissions of {sent.tenant!r} were refused; no more of them are looked at.",
                "Begin the run again once its data owner sends what `tune` wrote.",
            )
        try:
            self._recording(sent.tenant, lambda: self.registry.tenants.check_sender(sent.tenant, sent.token))
            return self._take(sent)
        except ArtifactRefused as error:
            self._refused[sent.tenant] = self._refused.get(sent.tenant, 0) + 1
            self.registry.tenants.refuse(sent.tenant, error.problem)
            raise

    def end(self, number: int) -> Round:
        """Closes a round and makes its plug-ins, unless it stays below its quorum; again, it changes nothing.

        Raises:
            ConfigError, ArtifactRefused: as :func:`~scaleot_ray.plugin.aggregation.aggregate`.
        """
        current = self.registry.rounds.close(number)
        if current.state == "closed":
            revoked = {one.name for one in self.registry.tenants.all() if one.state == "revoked"}
            counted = [one for one in self.registry.submissions.of_round(number) if one.tenant not in revoked]
            if len(counted) < current.quorum:  # someone was revoked who had submitted
                self.registry.rounds.fail(number, f"{len(counted)} of the {current.quorum} submissions of its quorum")
                return self.registry.rounds.get(number)
            results = [NewPlugIn(one.tenant, one.digest, one.folder, {}, [one]) for one in counted]
            if self.aggregation is not None:
                results.append(self._aggregate(number, counted, self.aggregation, self._base(number)))
            self.registry.plug_ins.finish_round(number, results)
        return self.registry.rounds.get(number)

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
        of is not undone. Its deltas are removed, and the old aggregates once nothing in force began with them.

        Returns:
            Rounds whose aggregate changed; once more, none.

        Raises:
            ConfigError: there is no such data owner.
            ArtifactRefused: a delta on disk is damaged.
        """
        self.registry.tenants.set_state(tenant, "revoked", reason)
        withdrawn = f"{tenant} was revoked" + (f": {reason}" if reason else "")
        for found in self.registry.rounds.all():
            if found.state != "finished" and self.registry.rounds.find_part(found.number, tenant) is not None:
                self.registry.rounds.withdraw(found.number, tenant, withdrawn)
        changed = []
        for one in self.registry.plug_ins.all():
            if one.state != "active" or one.name != AGGREGATE:
                continue
            was_in = any(part.tenant == tenant for part in self.registry.plug_ins.made_from(one))
            if was_in or _began(one) != self._base(one.round):
                self._remake(one.round, tenant, withdrawn)
                changed.append(one.round)
        # Last, so that a revocation that was cut short finds what is left to do.
        for one in self.registry.plug_ins.of(tenant):
            if one.state == "active":
                self.registry.plug_ins.revoke(tenant, one.round, withdrawn)
        self._drop_unused()
        return changed

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

    def _take(self, sent: Sent) -> Submission:
        began = self._start_of(sent.round)
        delta = self._read(sent.tenant, "delta", sent.delta)
        find = self.registry.submissions.find
        before = self._recording(
            sent.tenant, lambda: find(sent.tenant, delta.digest, sent.round, self.rounds.staleness), delta
        )
        if before is not None:
            return before
        cross(delta, data_owner(sent.tenant), MODEL_OWNER, self._audit, parent=self.emulator, start=began)
        metrics = self._read(sent.tenant, "metrics", sent.metrics)
        cross(metrics, data_owner(sent.tenant), MODEL_OWNER, self._audit, parent=self.emulator)
        assert isinstance(metrics.manifest.content, MetricsContent)  # Manifest ties content to kind
        place = self._place(delta.digest)
        new = not place.exists()
        if new:
            write_artifact(delta, place)
        norm = contributions([(sent.tenant, place, 1.0)], self._place(began) if began is not None else None)[0].norm()
        if self.rounds.max_norm is not None and norm > self.rounds.max_norm:
            if new:  # else it counts in an earlier round
                shutil.rmtree(place)
            raise ArtifactRefused(
                f"the delta's norm is {norm:.4g}, above rounds.max_norm={self.rounds.max_norm:g}.",
                "Lower tune.learning_rate or tune.steps, or raise rounds.max_norm.",
            )
        return self.registry.submissions.add(
            NewSubmission(
                tenant=sent.tenant,
                tuned_round=sent.round,
                digest=delta.digest,
                folder=place,
                bytes=delta.nbytes,
                norm=norm,
                weight=self._weights.get(sent.tenant, 1.0),
                metrics=dict(metrics.manifest.content.values),
                data_digest=sent.data_digest,
            ),
            self.rounds.staleness,
        )

    def _read(self, tenant: str, kind: Kind, read: Callable[[], Artifact]) -> Artifact:
        """What a data owner sent, if it is of that kind."""

        def of_kind() -> Artifact:
            artifact = read()
            if artifact.manifest.kind != kind:
                raise ArtifactRefused(
                    f"{data_owner(tenant)} sent an artefact of kind {artifact.manifest.kind!r} as its {kind}.",
                    "Send what `tune` wrote.",
                )
            return artifact

        return self._recording(tenant, of_kind, kind=kind)

    def _recording(
        self, tenant: str, check: Callable[[], Any], delta: Artifact | None = None, kind: Kind = "delta"
    ) -> Any:
        """What a check gives; where it refuses, the audit log has a line, as it has of what the gate refuses."""
        try:
            return check()
        except ArtifactRefused as error:
            size, digest = (delta.nbytes, delta.digest) if delta is not None else (0, "")
            self._audit.record(
                data_owner(tenant), MODEL_OWNER, kind, size, digest, decision="refused", reason=error.problem
            )
            raise

    def _start_of(self, number: int) -> str | None:
        """Digest of what a round began with; a round that there is not is refused later, by its number."""
        return next((one.start for one in self.registry.rounds.all() if one.number == number), None)

    def _place(self, digest: str) -> Path:
        return self._folder / "deltas" / digest

    def _on_its_way(self, digest: str, recipient: str) -> Artifact:
        artifact = read_artifact(self._place(digest), expected_kind="delta", verify=False)  # the gate verifies
        cross(artifact, MODEL_OWNER, recipient, self._audit, parent=self.emulator, start=ANY_START)
        return artifact

    def _aggregate(
        self, number: int, counted: Sequence[Submission], settings: AggregationSettings, base: str | None
    ) -> NewPlugIn:
        """One delta of a round's submissions, from the aggregate ``base`` of the round before on."""
        late = {}
        for one in counted:
            # What it began with is the base, unless it was late, or the base was made anew since without someone.
            began = self._start_of(one.tuned_round)
            if began != base:
                late[one.tenant] = self._place(began) if began is not None else None
        states = self._folder / "server"
        before = states / f"{number - 1}.safetensors"
        carried = settings.server != "none" and base is not None and before.exists()
        made = aggregate(
            [(one.tenant, one.folder, one.weight) for one in counted],
            settings,
            self._place(base) if base is not None else None,
            ServerState.read(before) if carried else None,
            late,
        )
        if made.state is not None:
            states.mkdir(parents=True, exist_ok=True)
            made.state.write(states / f"{number}.safetensors")
        artifact = made.delta.to_artifact(self.emulator, base)
        place = self._place(artifact.digest)
        if not place.exists():
            write_artifact(artifact, place)
        how = {**settings.model_dump(mode="json"), "clipped": made.clipped, "lost": made.lost}
        return NewPlugIn(AGGREGATE, artifact.digest, place, how, counted)

    def _aggregated(self) -> set[int]:
        """Rounds that have an aggregate; those of runs without aggregation are not among rounds.count."""
        return {one.round for one in self.registry.plug_ins.of(AGGREGATE)}

    def _base(self, number: int) -> str | None:
        """Digest of the aggregate in force of the latest round before this one that has one."""
        found = [one for one in self.registry.plug_ins.of(AGGREGATE) if one.state == "active" and one.round < number]
        return max(found, key=lambda one: one.round).digest if found else None

    def _remake(self, number: int, without: str, reason: str) -> None:
        """Makes the aggregate of a finished round anew from what counts of it, or withdraws it where nothing does."""
        (made,) = [one for one in self.registry.plug_ins.of(AGGREGATE, number) if one.state == "active"]
        counted = [one for one in self.registry.plug_ins.made_from(made) if one.tenant != without]
        how = {key: value for key, value in made.settings.items() if key in AggregationSettings.model_fields}
        try:
            new = self._aggregate(number, counted, AggregationSettings(**how), self._base(number))
        except ConfigError:  # nobody is left, or too few for this way of aggregating
            self.registry.plug_ins.revoke(AGGREGATE, number, reason)
            (self._folder / "server" / f"{number}.safetensors").unlink(missing_ok=True)
            return
        self.registry.plug_ins.replace(number, new, reason)

    def _drop_unused(self) -> None:
        """Removes the artefacts that nothing in force was made from or began with."""
        registry = self.registry
        used = {one.digest for one in registry.plug_ins.all() if one.state == "active"}
        revoked = {one.name for one in registry.tenants.all() if one.state == "revoked"}
        rounds = registry.rounds.all()
        for one in rounds:
            kept = [found for found in registry.submissions.of_round(one.number) if found.tenant not in revoked]
            used |= {found.digest for found in kept}
            used |= {start for found in kept if (start := self._start_of(found.tuned_round)) is not None}
        # What is under way, may go on, or may still be submitted late began with these.
        used |= {one.start for one in rounds[-1 - self.rounds.staleness :] if one.start is not None}
        for place in (self._folder / "deltas").glob("*"):
            if place.name not in used and not place.name.startswith("."):
                shutil.rmtree(place)


def _began(plug_in: PlugIn) -> str | None:
    """Digest of the aggregate that another one was made on top of."""
    content = read_manifest(plug_in.folder).content
    assert isinstance(content, DeltaContent)  # Manifest ties content to kind
    return content.start
