"""All finished cells of a folder as one JSON document, which is committed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.utility.measured import MEASURES, Measured, describe, gain_record, mean_over_seeds, score_from
from scaleot_ray.errors import DataError
from scaleot_ray.stages.identity import identity
from scaleot_ray.stages.record import read_record

SCHEMA = 1
RUN_FILE = "run.json"

Record = dict[str, Any]


def read_cells(output: Path) -> list[Record]:
    """All finished cells in ``output``: by kind of task, task and point, then by seed.

    Raises:
        DataError: there is none.
    """
    found = [read_record(path) for path in sorted((output / "cells").glob("*.json"))]
    found = [cell for cell in found if cell]
    if not found:
        raise DataError(f"{output}: there is no finished cell.", "Give the --output folder of a benchmark run.")
    return sorted(found, key=lambda record: [record["cell"][fact] for fact in ("kind", "task", "label", "seed")])


def summarise(output: Path) -> Record:
    """The document: how the cells were made, by which code, each cell, and the mean over seeds.

    The mean over seeds is taken test row by test row; its intervals are over test rows. How much seeds
    differ stands beside it (``seeds``: the plug-in's difference to full zero-shot, seed by seed; ``seeds`` of each
    ``gain``: the same of G, None where a seed's is not usable).

    Args:
        output: folder of the run.
    """
    records, run = read_cells(output), read_record(output / RUN_FILE)
    environments: list[Record] = []
    for record in records:
        if record["environment"] not in environments:
            environments.append(record["environment"])
    return {
        "schema": SCHEMA,
        "benchmark": "utility",
        "model": run.get("model"),
        "commands": list(run.get("commands", ())),
        "date": max(record["date"] for record in records),
        "environments": environments,
        "code": _code(records),
        "over_seeds": [_over_seeds(group) for group in _groups(records)],
        "cells": [_cell(record, environments) for record in records],
    }


def code_line(code: Sequence[Record]) -> str:
    """A document's ``code`` in words: which code made the cells; a table of several says so."""
    shown = []
    for entry in code:
        name = f"revision {entry['revision'][:12]}" if entry["revision"] else "code of unknown revision"
        state = " with uncommitted changes" if entry["dirty"] else ""
        shown.append(f"{name}{state} ({entry['cells']} cell{'s' if entry['cells'] > 1 else ''})")
    several = "Cells were made by different code, so rows may differ for that reason alone: " if len(shown) > 1 else ""
    return f"{several or 'Made by '}{', '.join(shown)}."


def _code(records: Sequence[Record]) -> list[Record]:
    """``revision``, ``dirty`` and the number of ``cells``; the revision is None where none was recorded."""
    found = Counter((made.get("revision"), made.get("dirty")) for made in (record["environment"] for record in records))
    return [{"revision": revision, "dirty": dirty, "cells": cells} for (revision, dirty), cells in found.items()]


def _groups(records: Sequence[Record]) -> Iterable[list[Record]]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(identity(facts=record["cell"] | {"seed": None}), []).append(record)
    return groups.values()


def _scores(record: Mapping[str, Any]) -> dict[str, Measured]:
    return {row: score_from(values) for row, values in record["rows"].items()}


def _over_seeds(records: Sequence[Record]) -> Record:
    # One folder may hold cells of several models, versions or budgets; a mean over them means nothing.
    if len({identity(made=_without_seed(record)) for record in records}) > 1:
        raise DataError(
            f"cells of {_name(records[0])} and its other seeds were made by different models, data, steps or test "
            "rows.",
            "Run the benchmark again with one budget; cells that fit already are kept.",
        )
    scores = [_scores(record) for record in records]
    # A row that some seeds lack has no mean.
    common = [row for row in scores[0] if all(row in own for own in scores)]
    means = {row: mean_over_seeds([own[row] for own in scores]) for row in common}
    metric = means["plug_in"].metric
    measures, seeds = describe(means), [str(record["cell"]["seed"]) for record in records]
    for measure in MEASURES[metric]:
        gains = [gain_record(own, measure)["value"] for own in scores]
        measures[measure]["gain"]["seeds"] = dict(zip(seeds, gains, strict=True))
    return {
        **{key: value for key, value in records[0]["cell"].items() if key != "seed"},
        "metric": metric,
        "loss_margin": sum(record["emulator"]["loss_margin"] for record in records) / len(records),
        "verbatim_share": sum(record["emulator"]["verbatim_share"] for record in records) / len(records),
        "measures": measures,
        "seeds": {
            seed: {
                measure: own["plug_in"].blocks(measure).mean - own["full_zero_shot"].blocks(measure).mean
                for measure in MEASURES[metric]
            }
            for seed, own in zip(seeds, scores, strict=True)
        },
    }


def _without_seed(record: Mapping[str, Any]) -> Record:
    settings = {
        name: {**part, "seed": None} if isinstance(part, dict) else part for name, part in record["settings"].items()
    }
    return {"of": record["of"], "settings": settings}


def _cell(record: Mapping[str, Any], environments: Sequence[Record]) -> Record:
    scores = _scores(record)
    kept = ("settings", "emulator", "delta_bytes", "seconds", "date", "digest")
    return {
        **record["cell"],
        "metric": scores["plug_in"].metric,
        "measures": describe(scores),
        **{key: record[key] for key in kept},
        "environment": environments.index(record["environment"]),
    }


def _name(record: Mapping[str, Any]) -> str:
    return " ".join(str(part) for key, part in record["cell"].items() if key != "seed")
