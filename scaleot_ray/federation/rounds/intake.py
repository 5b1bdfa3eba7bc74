"""What data owners send: through the gate, into the store, into the registry; only then is it acknowledged."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from scaleot_ray.artifacts.artifact import Artifact
from scaleot_ray.artifacts.audit import MODEL_OWNER, UNKNOWN_SENDER, AuditLog, data_owner
from scaleot_ray.artifacts.crossing import cross, crossing_bytes
from scaleot_ray.artifacts.gate import check_crossing
from scaleot_ray.artifacts.manifest import DeltaContent, Kind, Manifest, MetricsContent
from scaleot_ray.artifacts.untrusted import untrusted
from scaleot_ray.config import RoundSettings
from scaleot_ray.errors import ArtifactRefused
from scaleot_ray.federation.rounds.aggregates import start_of
from scaleot_ray.federation.rounds.artifact_store import ArtifactStore
from scaleot_ray.federation.rounds.fit import REMEDY, Fit, check_size
from scaleot_ray.federation.rounds.refusals import NotRead, Refusals
from scaleot_ray.federation.rounds.registry import NewSubmission, Registry, Submission, UnknownSender
from scaleot_ray.plugin.aggregation import contributions

_Found = TypeVar("_Found")
_DATA_DIGEST = re.compile(r"[0-9a-f]{64}")


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


class Intake:
    """The way in.

    Args:
        emulator: manifest of the emulator that deltas are of.
        registry: counts what was let in.
        store: keeps it.
        audit: log of what crosses.
        rounds: section of the run's settings.
        weights: of the data owners in the aggregate, by name; 1 for those that are not in it.
        fit: knows what deltas must be like.
    """

    def __init__(
        self,
        emulator: Manifest,
        registry: Registry,
        store: ArtifactStore,
        audit: AuditLog,
        rounds: RoundSettings,
        weights: Mapping[str, float],
        fit: Fit,
    ) -> None:
        self._emulator, self._registry, self._store, self._audit = emulator, registry, store, audit
        self._rounds, self._weights, self._fit = rounds, dict(weights), fit
        self._refusals = Refusals(registry)

    def take(self, sent: Sent, between_rounds: bool = False) -> Submission | None:
        """Takes what a data owner sends through the gate into the registry; sent twice, it counts once.

        Args:
            sent: what came.
            between_rounds: the round before is over, and the next one is not open yet.

        Returns:
            The submission; its delta is in the store now, and itself on the disk. None of one that is late for the
            round that is over and will be fresh enough for the next: it is to be sent once more when that is open.

        Raises:
            ArtifactRefused: the data owner is not admitted or its token is wrong, one of the artefacts is not
                what it says or not what may cross, the delta was not tuned as the run's settings say or is longer
                than they let in, or no round takes it; audit log and registry say so too.
            ResourcesMissing: the store does not answer, or has no room; nothing counts then.
        """
        self._check_sender(sent)
        with self._refusals.counting(sent.tenant):
            self._recording(sent.tenant, lambda: _check_form(sent))
            began = start_of(self._registry, sent.round)
            delta = self._read(sent.tenant, "delta", sent.delta)
            known = sent.tenant, delta.digest, sent.round
            if (before := self._registry.submissions.acknowledged(*known)) is not None:
                return before
            if between_rounds and self._is_fresh(sent.round):
                return None
            find = self._registry.submissions.find
            self._recording(sent.tenant, lambda: find(*known, self._rounds.staleness), delta)
            self._recording(sent.tenant, lambda: self._check(sent.tenant, delta, began), delta)
        norm, values = self._keep(sent, delta, began)
        assert isinstance(delta.manifest.content, DeltaContent)  # Manifest ties content to kind
        new = NewSubmission(
            tenant=sent.tenant,
            tuned_round=sent.round,
            digest=delta.digest,
            folder=self._store.place(delta.digest),
            bytes=delta.nbytes,
            norm=norm,
            weight=self._weights.get(sent.tenant, 1.0),
            metrics=values,
            data_digest=sent.data_digest,
            settings=self._fit.tuned_with(sent.tenant, delta.manifest.content),
            code_version=delta.manifest.library_version,
        )
        return self._registry.submissions.add(new, self._rounds.staleness)

    def _check_sender(self, sent: Sent) -> None:
        """Refuses what does not show who it is from, and what is from somebody of whom enough was refused.

        Whoever cannot show it is counted under no name: else anybody could use up somebody else's refusals.
        """
        tenants, unknown = self._registry.tenants, None
        try:
            tenants.authenticate(sent.tenant, sent.token)
        except UnknownSender as error:
            unknown = error
        sender = sent.tenant if unknown is None else None
        try:
            self._refusals.check(sender)
            with self._refusals.counting(sender):
                if unknown is not None:
                    raise unknown
                tenants.check_active(sent.tenant)
        except NotRead:
            raise  # however many come, the log stays small
        except ArtifactRefused as error:
            party = data_owner(sender) if sender is not None else UNKNOWN_SENDER
            self._audit.record(party, MODEL_OWNER, "delta", 0, "", decision="refused", reason=error.problem)
            raise

    def _is_fresh(self, number: int) -> bool:
        """Whether what was tuned in a round that is over may count in the one that follows the latest."""
        latest = len(self._registry.rounds.all())
        return latest + 1 - self._rounds.staleness <= number <= latest

    def _check(self, tenant: str, delta: Artifact, began: str | None) -> None:
        """Refuses what the gate does not let pass, and what does not fit what others send in this run."""
        with untrusted():
            check_crossing(delta, parent=self._emulator, start=began)
            assert isinstance(delta.manifest.content, DeltaContent)  # Manifest ties content to kind
            problem = self._fit.problem(tenant, delta.manifest.content)
            if problem is not None:
                raise ArtifactRefused(f"the delta does not fit: {problem}.", REMEDY)
            check_size(delta)

    def _keep(self, sent: Sent, delta: Artifact, began: str | None) -> tuple[float, dict[str, float]]:
        """Puts a delta into the store, unless its change is too long; gives its norm, and the metrics beside it."""
        tenant = sent.tenant
        # Outside of what is counted: that the store is damaged is no fault of the sender.
        start = self._store.fetch(began) if began is not None else None
        with self._store.adding(delta) as place:
            norm = contributions([(tenant, place, 1.0)], start)[0].norm()
            with self._refusals.counting(tenant):
                self._recording(tenant, lambda: self._check_norm(norm), delta)
                # Only now is it certain that it is let in.
                size = crossing_bytes(delta.manifest)
                self._audit.record(data_owner(tenant), MODEL_OWNER, "delta", size, delta.digest)
                metrics = self._read(tenant, "metrics", sent.metrics)
                cross(metrics, data_owner(tenant), MODEL_OWNER, self._audit, parent=self._emulator)
        assert isinstance(metrics.manifest.content, MetricsContent)  # Manifest ties content to kind
        return norm, dict(metrics.manifest.content.values)

    def _check_norm(self, norm: float) -> None:
        longest = self._rounds.max_norm
        if not math.isfinite(norm):
            raise ArtifactRefused(
                f"the delta's norm is {norm}, so nothing can be made of it.",
                "Lower tune.learning_rate, and tune again.",
            )
        if longest is not None and norm > longest:
            raise ArtifactRefused(
                f"the delta's norm is {norm:.4g}, above rounds.max_norm={longest:g}.",
                "Lower tune.learning_rate or tune.steps, or raise rounds.max_norm.",
            )

    def _read(self, tenant: str, kind: Kind, read: Callable[[], Artifact]) -> Artifact:
        """What a data owner sent, if it is of that kind."""

        def of_kind() -> Artifact:
            with untrusted():
                artifact = read()
            if artifact.manifest.kind != kind:
                raise ArtifactRefused(
                    f"{data_owner(tenant)} sent an artefact of kind {artifact.manifest.kind!r} as its {kind}.",
                    "Send what `tune` wrote.",
                )
            return artifact

        return self._recording(tenant, of_kind, kind=kind)

    def _recording(
        self, tenant: str, check: Callable[[], _Found], delta: Artifact | None = None, kind: Kind = "delta"
    ) -> _Found:
        """What a check gives; where it refuses, the audit log has a line, as it has of what the gate refuses."""
        try:
            return check()
        except ArtifactRefused as error:
            size, digest = (crossing_bytes(delta.manifest), delta.digest) if delta is not None else (0, "")
            self._audit.record(
                data_owner(tenant), MODEL_OWNER, kind, size, digest, decision="refused", reason=error.problem
            )
            raise

    def write_refusals(self) -> None:
        """Has the registry know how often something was refused unread, which is not written each time."""
        self._refusals.write()


def round_number(found: object) -> int | None:
    """What may be the number of a round; whoever sends one may send anything."""
    return found if type(found) is int and 0 < found < 1 << 31 else None


def _check_form(sent: Sent) -> None:
    """Refuses what no `tune` sends: it would be in the registry, or break it."""
    remedy = "Send what `tune` wrote."
    if round_number(sent.round) is None:
        raise ArtifactRefused("the round it was tuned in is no number of a round.", remedy)
    if sent.data_digest is not None and not (
        isinstance(sent.data_digest, str) and _DATA_DIGEST.fullmatch(sent.data_digest)
    ):
        raise ArtifactRefused("the digest of its data is none: an HMAC-SHA-256 has 64 hexadecimal digits.", remedy)
