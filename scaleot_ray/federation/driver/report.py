"""What came out of a run: the emulator, the standard table, what it took."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scaleot_ray.artifacts.manifest import Manifest
from scaleot_ray.emulator.assemble import emulator_content
from scaleot_ray.emulator.layer_map import LayerRole, positions
from scaleot_ray.evaluation.score import Score
from scaleot_ray.evaluation.table import ROWS, TenantTable, table_json
from scaleot_ray.federation.roles.coordinator import Opened
from scaleot_ray.federation.rounds.registry import PlugIn
from scaleot_ray.stages.record import write_record
from scaleot_ray.stages.score import reported

SCHEMA = "scaleot.run/1"
FILE = "report.json"


@dataclass
class TenantResult:
    """One data owner's part of the report.

    Attributes:
        name: the data owner.
        metric: ``loss`` or ``accuracy``.
        metrics: the numbers it sent: the emulator's two rows.
        measured: the evaluator's rows; None without a declared evaluator.
        delta_bytes, delta_digest: of the delta artefact; None where it has submitted none.
        seconds: ``tune``, and with an evaluator ``evaluate``.
        unmeasured: why the evaluator's rows are not all there; None where none was declared, or it had no trouble.
    """

    name: str
    metric: str
    metrics: dict[str, float]
    measured: TenantTable | None
    delta_bytes: int | None
    delta_digest: str | None
    seconds: dict[str, float]
    unmeasured: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The tenant's row of the report; rows that nobody may measure are null."""
        rows: dict[str, Score | None] = dict(self.measured.rows) if self.measured is not None else {}
        for row in ROWS:
            if rows.get(row) is None:
                rows[row] = reported(self.metrics, row, self.metric)
        return {
            **table_json(TenantTable(self.name, self.metric, rows)),
            "delta_bytes": self.delta_bytes,
            "delta_digest": self.delta_digest,
            "seconds": self.seconds,
            "unmeasured": self.unmeasured,
        }


@dataclass(frozen=True)
class RoundResult:
    """One round of this run.

    Attributes:
        number: from 1.
        state: ``finished`` or ``failed``.
        submitted: data owners whose delta counts.
        missing: the others, and why.
        seconds: from its opening to its plug-ins.
    """

    number: int
    state: str
    submitted: list[str]
    missing: dict[str, str]
    seconds: float

    @classmethod
    def of(cls, ended: Opened, seconds: float, missing: dict[str, str]) -> RoundResult:
        """What the coordinator says of a round that has ended."""
        there = sorted(name for name, submitted in ended.submitted.items() if submitted)
        return cls(ended.round.number, ended.round.state, there, missing, seconds)


@dataclass
class RunReport:
    """Result of :func:`scaleot_ray.federation.run.run_local`.

    Attributes:
        model: what the user gave as ``model.path``.
        directory: the run's folder.
        emulator: the emulator's manifest.
        privacy: what a privacy level required and what was reached; None for a given (α, β).
        reused_stage_one: whether stage 1 was finished before.
        rounds: those of this run.
        aggregate: the plug-in that all data owners have in common; None without aggregation.
        tenants: by data owner, in the settings' order.
        seconds: ``total``, and by stage.
        peak_rss_bytes: peak memory of all processes together, shared pages counted once.
        audit: the audit log; ``audit_head``: digest of its last line, so that missing last lines show.
    """

    model: str
    directory: Path
    emulator: Manifest
    privacy: dict[str, Any] | None
    reused_stage_one: bool
    rounds: list[RoundResult]
    aggregate: PlugIn | None
    tenants: list[TenantResult]
    seconds: dict[str, float]
    peak_rss_bytes: int
    audit: Path
    audit_head: str

    def as_json(self) -> dict[str, Any]:
        """The report as plain values; see docs/json.md."""
        return {
            "schema": SCHEMA,
            "model": self.model,
            "directory": str(self.directory),
            "seconds": self.seconds,
            "peak_rss_bytes": self.peak_rss_bytes,
            "emulator": self._emulator(),
            "rounds": [asdict(one) for one in self.rounds],
            "aggregate": self._aggregate(),
            "tenants": [tenant.as_json() for tenant in self.tenants],
            "audit": str(self.audit),
            "audit_head": self.audit_head,
        }

    def write(self) -> Path:
        """Writes ``report.json`` into the run's folder, whole or not at all."""
        path = self.directory / FILE
        write_record(path, self.as_json())
        return path

    def _aggregate(self) -> dict[str, Any] | None:
        if self.aggregate is None:
            return None
        made = self.aggregate
        return {"round": made.round, "digest": made.digest, "directory": made.folder, "settings": made.settings}

    def _emulator(self) -> dict[str, Any]:
        content = emulator_content(self.emulator)
        return {
            "digest": self.emulator.digest(),
            "alpha": content.alpha,
            "beta": content.beta,
            "plug_in_layers": content.plug_in_layers,
            "layout": content.layout,
            "builder": content.builder,
            "replaced_layers": list(positions(content.layer_map, LayerRole.REPLACED)),
            "dropped_layers": list(positions(content.layer_map, LayerRole.DROPPED)),
            "layer_map": content.layer_map,
            "bytes": self.emulator.nbytes,
            "full_bytes": content.full_bytes,
            "verbatim_share": content.verbatim_share,
            "full_loss": content.full_loss,
            "emulator_loss": content.emulator_loss,
            "loss_margin": content.loss_margin,
            "privacy": self.privacy,
            "reused_stage_one": self.reused_stage_one,
        }
