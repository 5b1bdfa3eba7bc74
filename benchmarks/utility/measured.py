"""Scores as a cell's JSON holds them: every measure, block by block, so that anything paired can be said later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scaleot_ray.errors import DataError
from scaleot_ray.evaluation.gain import Interval, bootstrap_means, difference, ratio_interval
from scaleot_ray.evaluation.score import Blocks, Score
from scaleot_ray.evaluation.table import ROWS, SECONDARY, TenantTable, recovered_gain

MEASURES = {metric: (metric, *further) for metric, further in SECONDARY.items()}
"""Measures of each metric."""

ALL_LAYERS = "all_layers_tuned"
"""Row beside the standard table: the full model with every decoder layer tuned; papers measure G against it."""

AHEAD = 0.2
"""G counts only where the plug-in is ahead of the tuned emulator by this share of the full gain: whoever holds an
emulator that does as well needs no plug-in."""

DIFFERENCES = (("plug_in", "full_zero_shot"), ("plug_in", "emulator_tuned"), ("full_tuned", "full_zero_shot"))


@dataclass(frozen=True)
class Measured:
    """A score from its blocks (a :class:`~scaleot_ray.evaluation.score.Score`).

    Attributes:
        metric: ``loss`` or ``accuracy``.
        measures: blocks by measure.
    """

    metric: str
    measures: Mapping[str, Blocks]

    @property
    def value(self) -> float:
        """The metric's value."""
        return self.measures[self.metric].mean

    def blocks(self, measure: str) -> Blocks:
        """A measure block by block."""
        return self.measures[measure]


def score_record(score: Score) -> dict[str, Any]:
    """A score as plain JSON: ``metric``, ``counts``, and ``sums`` by measure."""
    found = {measure: score.blocks(measure) for measure in MEASURES[score.metric]}
    blocks = {measure: own for measure, own in found.items() if own is not None}
    return {
        "metric": score.metric,
        "counts": blocks[score.metric].counts.tolist(),
        # A millionth of a nat decides nothing, and digits beyond it are most of a committed file.
        "sums": {measure: own.sums.round(6).tolist() for measure, own in blocks.items()},
    }


def score_from(record: Mapping[str, Any]) -> Measured:
    """What :func:`score_record` gave, as a score."""
    counts = np.array(record["counts"])
    return Measured(
        record["metric"],
        {
            measure: Blocks(np.array(sums, dtype=np.float64), counts, higher_is_better=measure != "loss")
            for measure, sums in record["sums"].items()
        },
    )


def mean_over_seeds(scores: Sequence[Measured]) -> Measured:
    """Block by block the mean over seeds.

    Raises:
        DataError: the seeds were not measured on the same blocks.
    """
    first = scores[0]
    counts = first.blocks(first.metric).counts
    if not all(np.array_equal(score.blocks(score.metric).counts, counts) for score in scores):
        raise DataError(
            "Seeds of one cell were measured on different test rows.",
            "Run the benchmark again with one --data folder and one budget; cells that fit are kept.",
        )
    return Measured(
        first.metric,
        {
            measure: Blocks(
                np.mean([score.blocks(measure).sums for score in scores], axis=0),
                blocks.counts,
                blocks.higher_is_better,
            )
            for measure, blocks in first.measures.items()
        },
    )


def describe(rows: Mapping[str, Measured]) -> dict[str, Any]:
    """All measures of a table's rows: values, differences and G, each with its 95 % bootstrap interval over blocks.

    Returns:
        By measure: ``rows`` {row: value, low, high}, ``differences`` {"plug_in - full_zero_shot": …},
        ``gain`` {value, low, high, usable, reason, ahead, counts}; and ``blocks``, how many test rows there were.
        ``ahead`` {value, low, high} is the plug-in's lead over the tuned emulator as a share of the full gain, None
        where G is not usable; ``counts`` whether it reaches ``AHEAD``. With the row ``ALL_LAYERS`` also
        ``gain_of_all_layers``: the same with that row in place of ``full_tuned``.
    """
    metric = rows["plug_in"].metric
    result: dict[str, Any] = {"blocks": len(rows["plug_in"].blocks(metric).counts)}
    for measure in MEASURES[metric]:
        result[measure] = {
            "rows": {row: _interval(_own(score.blocks(measure))) for row, score in rows.items()},
            "differences": {
                f"{row} - {other}": _interval(difference(rows[row].blocks(measure), rows[other].blocks(measure)))
                for row, other in DIFFERENCES
            },
            "gain": gain_record(rows, measure),
        }
        if ALL_LAYERS in rows:
            of_all = {**rows, "full_tuned": rows[ALL_LAYERS]}
            result[measure]["gain_of_all_layers"] = gain_record(of_all, measure)
    return result


def gain_record(rows: Mapping[str, Measured], measure: str) -> dict[str, Any]:
    """G of the standard rows, the plug-in's lead over the tuned emulator, and whether that makes G count."""
    standard = {row: rows[row] for row in ROWS}
    gain = recovered_gain(TenantTable("", rows["plug_in"].metric, standard), measure=measure)
    if not gain.usable:
        return {**vars(gain), "ahead": None, "counts": False}
    names = ("full_zero_shot", "emulator_tuned", "plug_in", "full_tuned")
    blocks = [rows[name].blocks(measure) for name in names]
    zero_shot, emulator, plug_in, tuned = bootstrap_means(blocks)
    low, high = ratio_interval(plug_in - emulator, tuned - zero_shot)
    zero_shot, emulator, plug_in, tuned = (own.mean for own in blocks)
    lead = float((plug_in - emulator) / (tuned - zero_shot))
    return {**vars(gain), "ahead": {"value": lead, "low": low, "high": high}, "counts": lead >= AHEAD}


def _own(blocks: Blocks) -> Interval:
    low, high = np.percentile(bootstrap_means((blocks,)), (2.5, 97.5))
    return Interval(blocks.mean, float(low), float(high))


def _interval(interval: Interval) -> dict[str, float]:
    return {"value": interval.value, "low": interval.low, "high": interval.high}
