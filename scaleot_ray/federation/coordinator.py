"""The coordinator: every artefact and every table that crosses in a run is checked and recorded here.

The full model and the rows that a declared evaluator is given besides do not pass through here: it reads
them where they lie, and the coordinator records that.

It holds the one shared copy of the emulator, the registry of what came back, and the latest progress
report of every stage. It computes nothing, so it claims no processor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray

from scaleot_ray.artifacts.artifact import Artifact
from scaleot_ray.artifacts.audit import DATA_OWNERS, MODEL_OWNER, AuditLog, data_owner, evaluator
from scaleot_ray.artifacts.crossing import cross
from scaleot_ray.artifacts.manifest import Kind, Manifest, MetricsContent
from scaleot_ray.artifacts.storage import read_artifact
from scaleot_ray.emulator.assemble import emulator_content
from scaleot_ray.errors import ArtifactRefused
from scaleot_ray.evaluation.table import TenantTable
from scaleot_ray.federation.object_store import Shared, check_unchanged, from_shared, to_shared
from scaleot_ray.federation.role import Role
from scaleot_ray.federation.table_gate import unpack_table
from scaleot_ray.progress import Progress

COORDINATOR = "coordinator"
DRIVER = "driver"
"""The process that runs the phases and writes the report."""


@dataclass
class Entry:
    """What the registry knows of one tenant.

    Attributes:
        metrics: the numbers that came with its delta.
        delta_bytes, delta_digest: of the delta artefact.
    """

    metrics: dict[str, float]
    delta_bytes: int
    delta_digest: str


@ray.remote(max_restarts=0, concurrency_groups={"progress": 1})
class Coordinator(Role):
    """Registry, audit log and gate of one run.

    Args:
        audit: file of the audit log.
    """

    def __init__(self, audit: str) -> None:
        super().__init__(COORDINATOR, 1)
        self._audit = AuditLog(Path(audit))
        self._registry: dict[str, Entry] = {}
        self._deltas: dict[str, Shared] = {}
        self._metrics: dict[str, str] = {}
        self._tables: dict[str, TenantTable] = {}
        self._manifest: Manifest | None = None
        self._emulator: ray.ObjectRef | None = None
        self._reports: dict[str, Progress] = {}

    def publish(self, directory: str, recipients: list[str]) -> list[ray.ObjectRef]:
        """Puts the emulator on disk into the object store, once, for the given parties.

        Returns:
            The reference, in a list, so that Ray hands on the reference and not the emulator.

        Raises:
            ArtifactRefused: the artefact is damaged, or is an emulator that hides nothing; the audit log
                says so too.
        """
        with self._recording_refusal(MODEL_OWNER, DATA_OWNERS, "emulator"):
            artifact = read_artifact(directory, expected_kind="emulator", verify=False)  # the gate verifies
        for recipient in recipients:
            cross(artifact, MODEL_OWNER, recipient, self._audit)
        self._manifest, self._emulator = artifact.manifest, ray.put(to_shared(artifact))
        return [self._emulator]

    def declare_evaluator(self, tenant: str, rows_bytes: int, metric: str) -> None:
        """Records that the settings give one tenant's evaluator both secrets; its table is by ``metric``."""
        self._metrics[tenant] = metric
        assert self._manifest is not None
        content = emulator_content(self._manifest)
        declared = "evaluator declared in the settings"
        self._audit.record(
            MODEL_OWNER, evaluator(tenant), "full model", content.full_bytes, content.base_digest, reason=declared
        )
        # No digest: that of private rows would tell whoever has a guess at them.
        self._audit.record(data_owner(tenant), evaluator(tenant), "rows", rows_bytes, "", reason=declared)

    def submit(self, tenant: str, delta: Shared, metrics: Shared) -> None:
        """Takes a data owner's delta and metrics through the gate into the registry.

        Raises:
            ArtifactRefused: one of them is not what it says, or not what may cross; the audit log says so too.
        """
        sent = self._take(delta, "delta", data_owner(tenant))
        content = self._take(metrics, "metrics", data_owner(tenant)).manifest.content
        assert isinstance(content, MetricsContent)  # Manifest ties content to kind
        self._registry[tenant] = Entry(dict(content.values), sent.nbytes, sent.digest)
        self._deltas[tenant] = delta

    def _take(self, shared: Shared, kind: Kind, sender: str) -> Artifact:
        """What a data owner sent, if it is of that kind and passes the gate; recorded either way."""
        with self._recording_refusal(sender, MODEL_OWNER, kind):
            artifact = from_shared(shared)
            if artifact.manifest.kind != kind:
                raise ArtifactRefused(
                    f"{sender} sent an artefact of kind {artifact.manifest.kind!r} as its {kind}.",
                    "Send what `tune` wrote.",
                )
        cross(artifact, sender, MODEL_OWNER, self._audit, parent=self._manifest)
        return artifact

    def entry(self, tenant: str) -> Entry:
        """What the registry has of a tenant, without the delta itself."""
        return self._registry[tenant]

    def submit_table(self, tenant: str, data: bytes) -> None:
        """Takes an evaluator's rows through the gate.

        Raises:
            ArtifactRefused: no such evaluator was declared, or the rows are not what may cross; the audit
                log says so too.
        """
        line = (evaluator(tenant), DRIVER, "table", len(data), hashlib.sha256(data).hexdigest())
        with self._recording_refusal(*line):
            if tenant not in self._metrics:
                raise ArtifactRefused(
                    f"{evaluator(tenant)} is not declared in the settings.", "Set evaluator, or leave these rows out."
                )
            table = unpack_table(data, tenant, self._metrics[tenant])
        self._audit.record(*line)
        self._tables[tenant] = table

    def table(self, tenant: str) -> TenantTable:
        """A tenant's rows as they passed the gate."""
        return self._tables[tenant]

    def delta(self, tenant: str) -> Shared:
        """A tenant's delta for its evaluator; recorded as a crossing of its own."""
        shared = self._deltas[tenant]
        cross(from_shared(shared), MODEL_OWNER, evaluator(tenant), self._audit, parent=self._manifest)
        return shared

    def finish(self) -> None:
        """Ends the round: the shared emulator must still be what was put.

        Raises:
            RunFailed: a reader wrote to it; names the tensor.
        """
        if self._emulator is not None:
            check_unchanged(from_shared(ray.get(self._emulator)), self.name)

    @ray.method(concurrency_group="progress")
    def report(self, progress: Progress) -> None:
        """Takes a progress report; a later one of the same stage replaces it."""
        self._reports[progress.stage] = progress

    @ray.method(concurrency_group="progress")
    def reports(self) -> list[Progress]:
        """The reports since the last call, the latest of each stage."""
        latest, self._reports = self._reports, {}
        return list(latest.values())

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
