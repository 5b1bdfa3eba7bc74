"""The coordinator: every artefact and every table that crosses in a run is checked and recorded here.

The full model and the rows that a declared evaluator is given besides do not pass through here: it reads
them where they lie, and the coordinator records that.

It hands out the one shared copy of the emulator, keeps the rounds (:mod:`scaleot_ray.federation.rounds.round_keeper`),
and has the latest progress report of every stage. All but the last is on disk, so when its process dies
Ray starts it again and whatever was asked of it is asked once more: every method may be called twice.
It computes nothing but aggregates, so it claims no processor.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from scaleot_ray.artifacts.artifact import Artifact
from scaleot_ray.artifacts.audit import DATA_OWNERS, MODEL_OWNER, UNKNOWN_SENDER, AuditLog, data_owner, evaluator
from scaleot_ray.artifacts.crossing import cross
from scaleot_ray.artifacts.storage import read_artifact, read_manifest, write_artifact
from scaleot_ray.artifacts.untrusted import untrusted
from scaleot_ray.config import AggregationSettings, RoundSettings, TuneSettings
from scaleot_ray.emulator.assemble import emulator_content
from scaleot_ray.errors import ArtifactRefused
from scaleot_ray.evaluation.table import TenantTable
from scaleot_ray.federation.folder import RunFolder
from scaleot_ray.federation.roles.events import Events
from scaleot_ray.federation.roles.object_store import Shared, check_unchanged, from_shared, to_shared
from scaleot_ray.federation.roles.role import Role
from scaleot_ray.federation.roles.table_gate import unpack_table
from scaleot_ray.federation.rounds.administration import Request, carry_out
from scaleot_ray.federation.rounds.artifact_location import Location
from scaleot_ray.federation.rounds.intake import Sent, round_number
from scaleot_ray.federation.rounds.refusals import NotRead
from scaleot_ray.federation.rounds.registry import PlugIn, Round, UnknownSender
from scaleot_ray.federation.rounds.round_keeper import RoundKeeper
from scaleot_ray.progress import Progress
from scaleot_ray.stages.record import write_record

COORDINATOR = "coordinator"
DRIVER = "driver"
"""The process that runs the phases and writes the report."""


@dataclass(frozen=True)
class Charge:
    """What a coordinator is told when it starts, and again whenever it is started anew.

    Attributes:
        folder: the run's.
        registry: folder of the registry, on a disk of this machine.
        rounds, aggregation: sections of the settings.
        weights: of the data owners in the aggregate.
        metrics: by data owner whose evaluator the settings declare: what its table is measured by.
        artifacts: folder or URI that deltas and aggregates are kept in; None: where they were so far.
        lease_seconds: a coordinator that no driver has asked for so long ends itself; it outlives the driver's job.
        tunes: how each data owner tunes.
    """

    folder: str
    registry: str
    rounds: RoundSettings
    aggregation: AggregationSettings | None
    weights: dict[str, float]
    metrics: dict[str, str]
    artifacts: str | None = None
    lease_seconds: float = 60.0
    tunes: dict[str, TuneSettings] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """What the registry knows of one data owner.

    Attributes:
        metrics: the numbers that came with its delta.
        delta_bytes, delta_digest: of the delta artefact.
        round: it counts in.
    """

    metrics: dict[str, float]
    delta_bytes: int
    delta_digest: str
    round: int


@dataclass(frozen=True)
class Opened:
    """A round that was begun.

    Attributes:
        round: its row in the registry.
        submitted: who takes part, and whether its delta is there already.
        last: no round of this run follows.
    """

    round: Round
    submitted: dict[str, bool]
    last: bool


@ray.remote(max_restarts=100, max_task_retries=-1, concurrency_groups={"progress": 1})
class Coordinator(Role):
    """Registry, audit log and gate of one run.

    Args:
        charge: what to do.
    """

    def __init__(self, charge: Charge) -> None:
        super().__init__(COORDINATOR, 1)
        self._charge, self._folder = charge, RunFolder(Path(charge.folder))
        self._events = Events(self._folder.log, self._folder.path.name)
        self._audit = AuditLog(self._folder.audit, self._events.metrics.crossed)
        self._opened: RoundKeeper | None = None
        self._emulator: ray.ObjectRef | None = None
        self._reports: dict[str, Progress] = {}
        self._heard = time.monotonic()
        threading.Thread(target=self._watch, name="lease", daemon=True).start()
        if ray.get_runtime_context().was_current_actor_reconstructed:
            self._events.started_again()

    def has_emulator(self, digest: str) -> bool:
        """Whether the run's folder has this emulator; not where the model owner built it on another node's disk."""
        try:
            return read_manifest(self._folder.emulator).digest() == digest
        except ArtifactRefused:
            return False

    def take_emulator(self, emulator: Shared) -> None:
        """Writes the emulator of a model owner on another node to the run's folder.

        Raises:
            ArtifactRefused: it was damaged on its way.
        """
        artifact = from_shared(emulator)
        artifact.verify()
        write_artifact(artifact, self._folder.emulator, overwrite=True)

    def publish(self, recipients: list[str]) -> None:
        """Lets the emulator of the run's folder go to the given parties, and opens the registry of its rounds.

        Raises:
            ArtifactRefused: the artefact is damaged, or is an emulator that hides nothing; the audit log
                says so too.
            ConfigError, ResourcesMissing: as :class:`RoundKeeper`.
        """
        with self._recording_refusal(MODEL_OWNER, DATA_OWNERS, "emulator"):
            # The gate verifies.
            artifact = read_artifact(self._folder.emulator, expected_kind="emulator", verify=False)
        for recipient in recipients:
            cross(artifact, MODEL_OWNER, recipient, self._audit)
        self._opened, self._emulator = None, None
        self._share(artifact)
        self._events.published(artifact, len(recipients))

    def emulator(self) -> list[ray.ObjectRef]:
        """Reference to the shared emulator, in a list, so that Ray hands on the reference and not the emulator."""
        if self._emulator is None:  # started anew: what it had put went with it
            artifact = read_artifact(self._folder.emulator, expected_kind="emulator")
            self._share(artifact)
        return [self._emulator]

    def admit(self, tenant: str, settings: dict[str, Any]) -> str | None:
        """Admits a data owner: the token its submissions must carry, None where it was cancelled or revoked."""
        token = self._keeper.admit(tenant, settings)
        self._events.admitted(tenant, token is not None)
        return token

    def begin_round(self, tenants: list[str]) -> Opened | None:
        """The round to work on; None after the last. See :meth:`RoundKeeper.begin`."""
        self._events.made_anew(self._keeper.finish_revocations())
        for one in self._keeper.withdraw_misfits():
            self._events.withdrawn(one)
        found = self._keeper.begin(tenants)
        if found is None:
            return None
        opened = self._described(found)
        self._events.round_begins(found, opened.submitted)
        return opened

    def begin_part(self, number: int, tenant: str, start_id: str | None = None) -> int:
        """Records that a data owner's tuning starts; with the same id once more, nothing new."""
        attempt = self._keeper.begin_part(number, tenant, start_id)
        self._events.tuning_starts(tenant, number, attempt)
        return attempt

    def died(self, number: int, tenant: str, reason: str) -> None:
        """Records that the process died in which a data owner tuned."""
        self._events.died(tenant, number, reason)

    def note(self, what: str, tenant: str | None = None, number: int | None = None) -> None:
        """Writes to the run's log what the driver says, of a data owner mostly."""
        self._events.noted(what, tenant, number)

    def leave_out(self, number: int, tenant: str, reason: str) -> None:
        """Records that nothing is to be expected of a data owner in a round any more."""
        self._keeper.leave_out(number, tenant, reason)
        self._events.left_out(tenant, number, reason)

    def end_round(self, number: int) -> Opened:
        """Closes a round and makes its plug-ins. See :meth:`RoundKeeper.end`."""
        ended = self._described(self._keeper.end(number))
        self._events.round_ends(ended.round, ended.submitted)
        return ended

    def start(self, number: int, tenant: str) -> Shared | None:
        """The delta that a round begins with, for a data owner; recorded as a crossing of its own."""
        artifact = self._keeper.start(number, tenant)
        return to_shared(artifact) if artifact is not None else None

    def submit(
        self, tenant: str, token: str, number: int, delta: Shared, metrics: Shared, data_digest: str | None = None
    ) -> bool:
        """Takes a data owner's delta and metrics through the gate into the registry.

        Returns:
            Whether it counts. If not, it came between two rounds and may count in the next, which begins when this
            actor is asked to: so it cannot wait for that here, and whoever sends it asks again.

        Raises:
            ArtifactRefused: as :meth:`RoundKeeper.take`.
        """
        sent = Sent(
            tenant,
            token,
            number,
            lambda: from_shared(delta, "delta"),
            lambda: from_shared(metrics, "metrics"),
            data_digest,
        )
        try:
            taken = self._keeper.take(sent)
        except NotRead:
            raise
        except UnknownSender as error:
            self._events.refused(None, None, error.problem)
            raise
        except ArtifactRefused as error:
            self._events.refused(tenant, round_number(number), error.problem)
            raise
        if taken is None:
            return False
        current = self._keeper.registry.rounds.get(taken.round)
        self._events.submitted(taken, current, sum(self._keeper.taking_part(taken.round).values()))
        return True

    def entry(self, tenant: str, number: int | None = None) -> Entry | None:
        """What the registry has of a data owner, without the delta itself: of a round, or the latest."""
        found = self._keeper.submitted(tenant, number)
        return Entry(found.metrics, found.bytes, found.digest, found.round) if found is not None else None

    def carry_out(self, request: Request) -> list[int]:
        """Does what an administrator asks; see :func:`scaleot_ray.federation.rounds.administration.carry_out`."""
        changed = carry_out(request, self._keeper)
        self._events.administered(request, changed)
        return changed

    def in_common(self) -> PlugIn | None:
        """The aggregate of the latest round that has one."""
        return self._keeper.in_common()

    def delta(self, tenant: str) -> Shared | None:
        """A data owner's latest delta for its evaluator; recorded as a crossing of its own. None once it is revoked."""
        found = self._keeper.submitted(tenant)
        return to_shared(self._keeper.delta(found.digest, evaluator(tenant))) if found is not None else None

    def aggregate(self, tenant: str) -> Shared | None:
        """The aggregate, where there is one, for a data owner's evaluator; recorded as a crossing of its own."""
        found = self._keeper.in_common()
        return to_shared(self._keeper.delta(found.digest, evaluator(tenant))) if found is not None else None

    def declare_evaluator(self, tenant: str, rows_bytes: int) -> None:
        """Records that the settings give one data owner's evaluator both secrets."""
        content = emulator_content(self._keeper.emulator)
        declared = "evaluator declared in the settings"
        self._audit.record(
            MODEL_OWNER, evaluator(tenant), "full model", content.full_bytes, content.base_digest, reason=declared
        )
        # No digest: that of private rows would tell whoever has a guess at them.
        self._audit.record(data_owner(tenant), evaluator(tenant), "rows", rows_bytes, "", reason=declared)

    def submit_table(self, tenant: str, data: bytes) -> None:
        """Takes an evaluator's rows through the gate.

        Raises:
            ArtifactRefused: no such evaluator was declared, or the rows are not what may cross; the audit
                log says so too.
        """
        # The name is whatever came: only that of a declared one is written and counted as a party.
        sender = evaluator(tenant) if tenant in self._charge.metrics else UNKNOWN_SENDER
        line = (sender, DRIVER, "table", len(data), hashlib.sha256(data).hexdigest())
        with self._recording_refusal(*line):
            if tenant not in self._charge.metrics:
                raise ArtifactRefused(
                    f"{evaluator(tenant)[:80]!a} is not declared in the settings.",
                    "Set evaluator, or leave these rows out.",
                )
            with untrusted():
                unpack_table(data, tenant, self._charge.metrics[tenant])
        self._audit.record(*line)
        write_record(self._folder.table(tenant), json.loads(data))

    def table(self, tenant: str) -> TenantTable:
        """A data owner's rows as they passed the gate."""
        return unpack_table(self._folder.table(tenant).read_bytes(), tenant, self._charge.metrics[tenant])

    def finish(self) -> None:
        """Ends the run: the shared emulator must still be what was put.

        Raises:
            RunFailed: a reader wrote to it; names the tensor.
        """
        if self._emulator is not None:
            check_unchanged(from_shared(ray.get(self._emulator)), self.name)

    @ray.method(concurrency_group="progress")
    def report(self, progress: Progress, role: str) -> None:
        """Takes a progress report of someone; a later one of the same stage replaces it."""
        self._reports[progress.stage] = progress
        self._events.metrics.progress(role, progress)

    @ray.method(concurrency_group="progress")
    def reports(self) -> list[Progress]:
        """The reports since the last call, the latest of each stage; whoever asks is the driver, which lives."""
        self._heard = time.monotonic()
        latest, self._reports = self._reports, {}
        return list(latest.values())

    @property
    def _keeper(self) -> RoundKeeper:
        if self._opened is None:  # started anew
            self._open(read_manifest(self._folder.emulator))
        assert self._opened is not None
        return self._opened

    def _described(self, found: Round) -> Opened:
        return Opened(found, self._keeper.taking_part(found.number), self._keeper.is_last(found.number))

    def _open(self, emulator: Any) -> None:
        charge = self._charge
        artifacts = Location.of(charge.artifacts) if charge.artifacts is not None else None
        if artifacts is not None:
            artifacts.check()  # this process may have other credentials than the driver, which has looked before
        self._opened = RoundKeeper(
            emulator,
            self._folder.emulator,
            self._folder.coordinator,
            Path(charge.registry),
            self._audit,
            charge.rounds,
            charge.aggregation,
            charge.weights,
            artifacts,
            charge.tunes,
        )
        self._events.made_anew(self._opened.made_anew)

    def _share(self, artifact: Artifact) -> None:
        if self._opened is None:
            self._open(artifact.manifest)
        self._emulator = ray.put(to_shared(artifact))

    def _watch(self) -> None:
        """Ends this actor for good once its driver is gone."""
        while time.monotonic() - self._heard < self._charge.lease_seconds:
            time.sleep(1)
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)

    @contextmanager
    def _recording_refusal(
        self, sender: str, recipient: str, kind: str, size: int = 0, digest: str = ""
    ) -> Iterator[None]:
        """Writes the line of what is refused in here: what :func:`cross` has no artefact of, or no check for."""
        try:
            yield
        except ArtifactRefused as error:
            self._audit.record(sender, recipient, kind, size, digest, decision="refused", reason=error.problem)
            raise
