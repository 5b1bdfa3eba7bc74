"""The standard table: five rows per data owner, Δ and recovered gain G (offsite-tuning literature; ScaleOT §4)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from scaleot_ray.evaluation.gain import MINIMUM_BLOCKS, Gain, difference, gain_between, unusable
from scaleot_ray.evaluation.loss import perplexity
from scaleot_ray.evaluation.score import Blocks, ReportedScore, Score

ROWS = ("full_zero_shot", "emulator_zero_shot", "emulator_tuned", "plug_in", "full_tuned")
AGGREGATE = "aggregate"
"""Row beside the five, where data owners have a plug-in in common: the full model with that one."""

SECONDARY: dict[str, tuple[str, ...]] = {"loss": (), "accuracy": ("normalised", "log_likelihood", "log_probability")}
"""Measures beside each metric, in a section of their own."""


@dataclass
class TenantTable:
    """The standard table of one data owner.

    Attributes:
        name: the data owner.
        metric: ``loss`` (nats per token, lower is better) or ``accuracy``.
        rows: score by row name out of ``ROWS`` and ``AGGREGATE``; a row that was not measured is None or left out.
    """

    name: str
    metric: str
    rows: Mapping[str, Score | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for row, score in self.rows.items():
            if row not in (*ROWS, AGGREGATE):
                raise ValueError(f"{row!r} is no row of the standard table: {ROWS}")
            if score is not None and score.metric != self.metric:
                raise ValueError(f"{row} holds {score.metric}, the table {self.metric}")

    def value(self, row: str, measure: str | None = None) -> float | None:
        """A measure's value in a row (default: the metric's); None where it is not known."""
        score = self.rows.get(row)
        if score is None:
            return None
        if measure is None or measure == self.metric:
            return float(score.value)
        if isinstance(score, ReportedScore):
            return score.further.get(measure)
        blocks = score.blocks(measure)
        return None if blocks is None else blocks.mean

    def blocks(self, row: str, measure: str) -> Blocks | None:
        """A measure of a row block by block; None where it is not known."""
        score = self.rows.get(row)
        return None if score is None else score.blocks(measure)


def recovered_gain(
    table: TenantTable, seed: int = 0, samples: int = 2000, measure: str | None = None, plug_in: str = "plug_in"
) -> Gain:
    """G of a table; ``measure`` is the table's metric unless another one is named, ``plug_in`` the row of the plug-in.

    Raises:
        DataError: the rows were not measured on the same blocks.
    """
    found: list[Blocks] = []
    for row in ("full_zero_shot", plug_in, "full_tuned"):
        if table.rows.get(row) is None:
            return unusable(f"{row} was not measured.")
        blocks = table.blocks(row, measure or table.metric)
        if blocks is None:
            return unusable(f"{row} is known as a number only, without its blocks.")
        found.append(blocks)
    full_zero_shot, plugged, full_tuned = found
    return gain_between(full_zero_shot, plugged, full_tuned, seed, samples)


def table_json(table: TenantTable, seed: int = 0, samples: int = 2000) -> dict[str, Any]:
    """The table as plain JSON.

    Keys: ``name``, ``metric``, the five rows (number or null), ``delta`` = plug_in − emulator_tuned,
    ``delta_interval`` ([low, high] or null), ``gain`` {value, low, high, usable, reason}; for accuracy also
    ``normalised``, ``log_likelihood`` and ``log_probability``, each with the same keys from the rows on; for loss
    also ``perplexity`` with the five rows; ``blocks``: test rows measured. Where the aggregate was measured, each of
    these sections has ``aggregate`` and ``aggregate_gain`` too.
    """
    result: dict[str, Any] = {"name": table.name, "metric": table.metric}
    result.update(_section(table, table.metric, seed, samples))
    for measure in SECONDARY[table.metric]:
        result[measure] = _section(table, measure, seed, samples)
    if table.metric == "loss":
        rows = (*ROWS, AGGREGATE) if table.rows.get(AGGREGATE) is not None else ROWS
        result["perplexity"] = {row: _perplexity(table.value(row)) for row in rows}
    measured = [blocks for row in ROWS if (blocks := table.blocks(row, table.metric)) is not None]
    result["blocks"] = len(measured[0].counts) if measured else None
    return result


def _section(table: TenantTable, measure: str, seed: int, samples: int) -> dict[str, Any]:
    values = {row: table.value(row, measure) for row in ROWS}
    plug_in, tuned = values["plug_in"], values["emulator_tuned"]
    after, before = table.blocks("plug_in", measure), table.blocks("emulator_tuned", measure)
    interval = None
    if after is not None and before is not None and len(after.counts) >= MINIMUM_BLOCKS:
        spread = difference(after, before, seed, samples)
        interval = [spread.low, spread.high]
    further = {}
    if table.rows.get(AGGREGATE) is not None:
        gain = recovered_gain(table, seed, samples, measure, AGGREGATE)
        further = {AGGREGATE: table.value(AGGREGATE, measure), "aggregate_gain": asdict(gain)}
    return {
        **values,
        "delta": None if plug_in is None or tuned is None else plug_in - tuned,
        "delta_interval": interval,
        "gain": asdict(recovered_gain(table, seed, samples, measure)),
        **further,
    }


def _perplexity(loss: float | None) -> float | None:
    found = None if loss is None else perplexity(loss)
    return found if found is not None and math.isfinite(found) else None
