"""What an evaluator's rows must be before they leave it: finite numbers, under known names, nothing else.

They travel as JSON: a table has a score for each row, and a score the numbers of each test block that
intervals are made from. They are no artefact, since nobody keeps them; the check is the same in kind.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from scaleot_ray.artifacts.untrusted import quoted
from scaleot_ray.errors import ArtifactRefused
from scaleot_ray.evaluation.choice import ChoiceScore
from scaleot_ray.evaluation.loss import LossScore
from scaleot_ray.evaluation.table import AGGREGATE, ROWS, TenantTable
from scaleot_ray.stages.score import score_from_record, score_record

TABLE_LIMIT = 64 << 20
"""Bytes of the largest table: a million test blocks in five rows."""

_REMEDY = "Run the evaluator of this version of scaleot_ray; nothing of the table has crossed."


def pack_table(table: TenantTable) -> bytes:
    """The measured rows of a table as what crosses."""
    scores = {row: score for row, score in table.rows.items() if isinstance(score, LossScore | ChoiceScore)}
    rows = {row: score_record(score) for row, score in scores.items()}
    return json.dumps({"name": table.name, "metric": table.metric, "rows": rows}).encode()


def unpack_table(data: bytes, name: str, metric: str) -> TenantTable:
    """The table in ``data``, checked to the last number.

    Args:
        data: what :func:`pack_table` gave.
        name: the data owner it must be of.
        metric: what that one's rows are measured by, ``loss`` or ``accuracy``.

    Raises:
        ArtifactRefused: it is too long or no such table; names the row and the measure.
    """
    values = _parsed(data)
    if values.keys() != {"name", "metric", "rows"} or not isinstance(values["rows"], dict):
        raise _refused(f"has the keys {quoted(sorted(values))}, expected metric, name and rows")
    if (values["name"], values["metric"]) != (name, metric):
        raise _refused(f"is not the table of {name} by {metric}")
    lengths = set()
    for row, record in values["rows"].items():
        if row not in (*ROWS, AGGREGATE):
            raise _refused(f"has the row {quoted(row)}, expected some of {', '.join(ROWS)}")
        checks = _MEASURES[metric]
        if not isinstance(record, dict) or record.keys() != checks.keys():
            raise _refused(f"row {row} is not made of {', '.join(checks)}")
        for measure, numbers in record.items():
            right, what = checks[measure]
            if not isinstance(numbers, list) or not all(map(right, numbers)):
                raise _refused(f"row {row}: {measure} holds something else than {what}")
            lengths.add(len(numbers))
        if metric == "loss" and not sum(record["counts"]):
            raise _refused(f"row {row} counts no token at all")
    if len(lengths) > 1 or 0 in lengths:
        raise _refused("has rows of different lengths, or empty ones")
    return TenantTable(name, metric, {row: score_from_record(record) for row, record in values["rows"].items()})


def _parsed(data: bytes) -> dict[str, Any]:
    if len(data) > TABLE_LIMIT:
        raise _refused(f"has {len(data)} bytes, more than the {TABLE_LIMIT} that may cross")
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        raise _refused("is no JSON") from None
    if not isinstance(values, dict):
        raise _refused("is no JSON object")
    return values


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 53


def _answer(value: Any) -> bool:
    return type(value) is bool


_Measures = dict[str, tuple[Callable[[Any], bool], str]]
_NUMBERS = (_number, "finite numbers")
_ANSWERS = (_answer, "true and false")
_MEASURES: dict[str, _Measures] = {
    "loss": {"sums": _NUMBERS, "counts": (_count, "whole numbers from 0 on")},
    "accuracy": {
        "correct": _ANSWERS,
        "correct_normalised": _ANSWERS,
        "log_likelihood": _NUMBERS,
        "log_probability": _NUMBERS,
    },
}


def _refused(problem: str) -> ArtifactRefused:
    return ArtifactRefused(f"the evaluator's table {problem}.", _REMEDY)
