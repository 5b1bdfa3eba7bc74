"""What a run's progress looks like to Prometheus: gauges and counters that every node of a Ray exports.

Tags: ``run`` (the folder's name), ``role`` (``model owner``, ``data owner``, ``evaluator``), ``tenant``, ``round``.
Ray puts ``ray_`` in front of each name; docs/administration.md has the list, cluster/grafana/ a dashboard.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

from scaleot_ray.federation.rounds.registry import Round
from scaleot_ray.progress import Progress

_WORK = ("run", "role", "tenant", "round", "stage")
_PART = ("run", "tenant", "round")
_SECONDS = [1.0, 10.0, 60.0, 600.0, 3600.0, 36000.0]


class RunMetrics:
    """The metrics of one run, set where all of it passes by: in the coordinator.

    Args:
        run: value of the tag ``run``.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._done = Gauge("scaleot_progress_ratio", "Steps done of a stage, 0 to 1.", _WORK)
        self._loss = Gauge("scaleot_loss_nats", "Loss of the latest step, nats per token.", _WORK)
        self._speed = Gauge("scaleot_tokens_per_second", "Speed of a stage in its process.", _WORK)
        self._round = Gauge("scaleot_round", "Number of the latest round.", ("run",))
        self._quorum = Gauge("scaleot_round_quorum", "Deltas without which a round fails.", ("run", "round"))
        self._there = Gauge("scaleot_round_submitted", "Data owners whose delta counts in a round.", ("run", "round"))
        self._seconds = Histogram(
            "scaleot_round_seconds", "From a round's opening to its plug-ins.", _SECONDS, ("run", "state")
        )
        self._starts = Counter("scaleot_tuning_starts", "How often a data owner's tuning was started.", _PART)
        self._left_out = Counter("scaleot_left_out", "Data owners of whom nothing more was expected in a round.", _PART)
        crossing = ("run", "sender", "recipient", "kind", "decision")
        self._crossings = Counter("scaleot_crossings", "Artefacts and tables at the gate, by decision.", crossing)
        self._bytes = Counter("scaleot_crossed_bytes", "Their bytes.", crossing)

    def progress(self, role: str, report: Progress) -> None:
        """A report of a stage; ``role`` is who it comes from, e.g. ``data owner alice``."""
        own = f" {report.tenant}" if report.tenant else ""
        kind, stage = role.removesuffix(own), report.stage.removesuffix(own)
        tags = self._tags(role=kind, tenant=report.tenant or "", round=_text(report.round), stage=stage)
        self._done.set(report.step / max(report.steps, 1), tags)
        if report.loss is not None:
            self._loss.set(report.loss, tags)
        if report.tokens_per_second is not None:
            self._speed.set(report.tokens_per_second, tags)

    def round_is(self, found: Round, submitted: int) -> None:
        """A round was opened, has got a delta, or has ended."""
        self._round.set(found.number, self._tags())
        self._quorum.set(found.quorum, self._tags(round=_text(found.number)))
        self._there.set(submitted, self._tags(round=_text(found.number)))

    def round_ended(self, state: str, seconds: float) -> None:
        """A round has ended as ``finished`` or ``failed``."""
        self._seconds.observe(seconds, self._tags(state=state))

    def tuning_starts(self, tenant: str, number: int) -> None:
        """A data owner's tuning was started."""
        self._starts.inc(1, self._tags(tenant=tenant, round=_text(number)))

    def left_out(self, tenant: str, number: int) -> None:
        """A data owner was left out of a round."""
        self._left_out.inc(1, self._tags(tenant=tenant, round=_text(number)))

    def crossed(self, line: Mapping[str, Any]) -> None:
        """A line of the audit log."""
        tags = self._tags(**{key: str(line[key]) for key in ("sender", "recipient", "kind", "decision")})
        self._crossings.inc(1, tags)
        if line["bytes"]:
            self._bytes.inc(line["bytes"], tags)

    def _tags(self, **tags: str) -> dict[str, str]:
        return {"run": self._run, **tags}


def _text(number: int | None) -> str:
    return "" if number is None else str(number)
