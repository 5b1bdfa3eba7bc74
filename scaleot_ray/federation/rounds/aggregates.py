"""Aggregates of rounds: made from what counts, and made anew without a data owner; which artefacts are in use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from scaleot_ray.artifacts.manifest import DeltaContent, Manifest
from scaleot_ray.config import AggregationSettings
from scaleot_ray.errors import ConfigError
from scaleot_ray.federation.rounds.artifact_store import ArtifactStore
from scaleot_ray.federation.rounds.registry import AGGREGATE, NewPlugIn, PlugIn, Registry, Submission
from scaleot_ray.plugin.aggregation import aggregate


class NotAggregated(ConfigError):
    """What counts in a round cannot be aggregated in that way, wherever its result would be kept."""


class Aggregates:
    """The aggregates of the rounds on one emulator.

    Args:
        emulator: its manifest.
        registry: knows what counts in a round, and what was made of it.
        store: holds what counts, and takes what is made of it.
    """

    def __init__(self, emulator: Manifest, registry: Registry, store: ArtifactStore) -> None:
        self._emulator, self._registry, self._store = emulator, registry, store

    def rounds(self) -> set[int]:
        """Rounds that have an aggregate; those of runs without aggregation are not among rounds.count."""
        return {one.round for one in self._registry.plug_ins.of(AGGREGATE)}

    def make(self, number: int, counted: Sequence[Submission], settings: AggregationSettings) -> NewPlugIn:
        """One delta of a round's submissions, from the aggregate of the round before on; it is in the store then.

        What has weight 0 is not in it: so a data owner stays out of all aggregates, and nothing is made anew when
        it is revoked.

        Raises:
            NotAggregated: as :func:`~scaleot_ray.plugin.aggregation.aggregate` raises ConfigError.
            ArtifactRefused, ConfigError, ResourcesMissing: as the store, which is as it was then but for the state.
        """
        before, store = self._before(number), self._store
        base = before.digest if before is not None else None
        counted = [one for one in counted if one.weight > 0]
        if not counted:
            raise NotAggregated(
                f"tenants: no delta of round {number} has a weight above 0, so there is nothing to aggregate.",
                "Give a data owner that submits a weight above 0, or leave aggregation out.",
            )
        late = {}
        for one in counted:
            # What it began with is the base, unless it was late, or the base was made anew since without someone.
            began = start_of(self._registry, one.tuned_round)
            if began != base:
                late[one.tenant] = store.fetch(began) if began is not None else None
        # Not that of round number - 1, which has none where all it was made of was revoked.
        state = store.state(before.round) if before is not None and settings.server != "none" else None
        deltas = [(one.tenant, store.fetch(one.digest), one.weight) for one in counted]
        start = store.fetch(base) if base is not None else None
        try:
            made = aggregate(deltas, settings, start, state, late)
        except ConfigError as error:
            raise NotAggregated(error.problem, error.remedy) from error
        if made.state is not None:
            store.write_state(number, made.state)
        else:  # one that was cut short may have written it, with other settings
            store.remove_state(number)
        artifact = made.delta.to_artifact(self._emulator, base)
        store.add(artifact)
        how = {**settings.model_dump(mode="json"), "clipped": made.clipped, "lost": made.lost}
        return NewPlugIn(AGGREGATE, artifact.digest, store.place(artifact.digest), how, counted)

    def withdraw(self, reasons: Mapping[str, str]) -> list[int]:
        """Makes the aggregates anew that data owners were part of, and those on top of them; gives their rounds.

        Args:
            reasons: by data owner.

        Raises:
            ArtifactRefused: a delta in the store is damaged; what was made anew by then stays so.
            ConfigError, ResourcesMissing: the store cannot be read or written; likewise.
        """
        changed = []
        for one in self._registry.plug_ins.all():
            if one.state != "active" or one.name != AGGREGATE:
                continue
            found = [reasons[part.tenant] for part in self._registry.plug_ins.made_from(one) if part.tenant in reasons]
            before = self._before(one.round)
            if found or self._began(one) != (before.digest if before is not None else None):
                self._remake(one, set(reasons), "; ".join(found or reasons.values()))
                changed.append(one.round)
        return changed

    def _remake(self, made: PlugIn, without: set[str], reason: str) -> None:
        """Makes the aggregate of a finished round anew from what counts of it, or withdraws it where nothing does."""
        counted = [one for one in self._registry.plug_ins.made_from(made) if one.tenant not in without]
        how = {key: value for key, value in made.settings.items() if key in AggregationSettings.model_fields}
        try:
            new = self.make(made.round, counted, AggregationSettings(**how))
        except NotAggregated:  # nobody is left, or too few for this way of aggregating
            self._registry.plug_ins.revoke(AGGREGATE, made.round, reason)
            self._store.remove_state(made.round)
            return
        self._registry.plug_ins.replace(made.round, new, reason)
        self._store.release({new.digest, *(one.digest for one in counted)})

    def _before(self, number: int) -> PlugIn | None:
        """The aggregate in force of the latest round before this one that has one: what this one is made on top of."""
        found = [one for one in self._registry.plug_ins.of(AGGREGATE) if one.state == "active" and one.round < number]
        return max(found, key=lambda one: one.round, default=None)

    def _began(self, plug_in: PlugIn) -> str | None:
        """Digest of the aggregate that another one was made on top of."""
        content = self._store.manifest(plug_in.digest).content
        assert isinstance(content, DeltaContent)  # Manifest ties content to kind
        return content.start


def start_of(registry: Registry, number: int) -> str | None:
    """Digest of what a round began with; a round that there is not is refused later, by its number."""
    return next((one.start for one in registry.rounds.all() if one.number == number), None)


def in_use(registry: Registry, staleness: int = 0) -> set[str]:
    """Digests of the artefacts that something in force is, was made from or began with.

    Args:
        registry: knows them.
        staleness: rounds that a delta may be late by.
    """
    used = {one.digest for one in registry.plug_ins.all() if one.state == "active"}
    revoked = {one.name for one in registry.tenants.all() if one.state == "revoked"}
    rounds = registry.rounds.all()
    for one in rounds:
        kept = [found for found in registry.submissions.of_round(one.number) if found.tenant not in revoked]
        used |= {found.digest for found in kept}
        used |= {start for found in kept if (start := start_of(registry, found.tuned_round)) is not None}
    # What is under way, may go on, or may still be submitted late began with these.
    return used | {one.start for one in rounds[-1 - staleness :] if one.start is not None}


def remove_unused(registry: Registry, store: ArtifactStore, staleness: int = 0) -> None:
    """Removes from a store what is not :func:`in_use`, and states that no aggregate in force was made with.

    Raises:
        ResourcesMissing: the store does not answer, or cannot be written; once more, it goes on from there.
    """
    made = {one.round for one in registry.plug_ins.of(AGGREGATE) if one.state == "active"}
    for one in registry.rounds.all():
        if one.number not in made:
            store.remove_state(one.number)
    for digest in unused(registry, store, staleness):
        store.remove(digest)


def unused(registry: Registry, store: ArtifactStore, staleness: int = 0) -> list[str]:
    """Digests of what is in a store and not :func:`in_use`, which a revocation removes."""
    used = in_use(registry, staleness)
    return [digest for digest in store.digests() if digest not in used]
