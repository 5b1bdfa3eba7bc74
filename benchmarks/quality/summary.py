"""All finished cells as one JSON document, which is committed, and as a Markdown table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.measured import MEASURES, Measured, describe, mean_over_seeds, score_from
from scaleot_ray.errors import DataError
from scaleot_ray.stages.identity import identity
from scaleot_ray.stages.record import read_record

SCHEMA = 1
RUN_FILE = "run.json"
_TITLES = {
    "closed_form": "ScaleOT, closed-form start",
    "random_start": "ScaleOT, random start",
    "paper": "ScaleOT, all as in the paper",
    "uniform_drop": "uniform LayerDrop",
}
_HEADINGS = {
    "loss": "Loss, nats per token (lower is better)",
    "accuracy": "Accuracy, %",
    "normalised": "Length-normalised accuracy, %",
    "log_likelihood": "Log-likelihood of the right answer, nats (higher is better)",
}
_COLUMNS = (
    "task | (N_a, α, β) | emulator | seeds | full zero-shot | emulator zero-shot | emulator tuned | plug-in | "
    "full tuned | Δ | plug-in − full zero-shot | G"
)


def read_cells(output: Path) -> list[dict[str, Any]]:
    """All finished cells in ``output``, by task, triplet, variant, seed.

    Raises:
        DataError: there is none.
    """
    found = [read_record(path) for path in sorted((output / "cells").glob("*.json"))]
    found = [cell for cell in found if cell]
    if not found:
        raise DataError(f"{output}: there is no finished cell.", "Give the --output folder of a benchmark run.")
    return sorted(found, key=lambda record: (*_group(record), record["cell"]["seed"]))


def summarise(output: Path) -> dict[str, Any]:
    """The document: how the cells were made, each cell, and the mean over seeds.

    The mean over seeds is taken test row by test row; its intervals are over test rows. How much seeds
    differ stands beside it (``seeds``: the plug-in's difference to full zero-shot, seed by seed).
    """
    records, run = read_cells(output), read_record(output / RUN_FILE)
    environments: list[dict[str, Any]] = []
    for record in records:
        if record["environment"] not in environments:
            environments.append(record["environment"])
    return {
        "schema": SCHEMA,
        "benchmark": "quality",
        "model": run.get("model"),
        "commands": list(run.get("commands", ())),
        "date": max(record["date"] for record in records),
        "environments": environments,
        "over_seeds": [_over_seeds(group) for group in _groups(records)],
        "cells": [_cell(record, environments) for record in records],
    }


def markdown(document: Mapping[str, Any]) -> str:
    """The means over seeds, one table for each measure."""
    entries = document["over_seeds"]
    lines: list[str] = []
    for measure in dict.fromkeys(measure for measures in MEASURES.values() for measure in measures):
        rows = [entry for entry in entries if measure in entry["measures"]]
        if rows:
            lines += ["", f"**{_HEADINGS[measure]}**", "", f"| {_COLUMNS} |", "|" + "---|" * (_COLUMNS.count("|") + 1)]
            lines += [_line(entry, measure) for entry in rows]
    lines += ["", "In brackets: 95 % bootstrap interval over test rows, paired where it is a difference or a ratio."]
    lines += [f"`{command}`" for command in document.get("commands", ())]
    return "\n".join(lines).strip() + "\n"


def _group(record: Mapping[str, Any]) -> tuple[Any, ...]:
    cell = record["cell"]
    return cell["task"], cell["plug_in_layers"], -cell["alpha"], cell["variant"], cell["beta"]


def _groups(records: Sequence[dict[str, Any]]) -> Iterable[list[dict[str, Any]]]:
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(_group(record), []).append(record)
    return groups.values()


def _scores(record: Mapping[str, Any]) -> dict[str, Measured]:
    return {row: score_from(values) for row, values in record["rows"].items()}


def _over_seeds(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    # One folder may hold cells of several models, versions or budgets; a mean over them means nothing.
    if len({identity(made=_without_seed(record)) for record in records}) > 1:
        raise DataError(
            f"cells of {_name(records[0])} and its other seeds were made by different models, steps or test rows.",
            "Run the benchmark again with one budget; cells that fit already are kept.",
        )
    scores = [_scores(record) for record in records]
    means = {row: mean_over_seeds([own[row] for own in scores]) for row in scores[0]}
    metric = means["plug_in"].metric
    return {
        **{key: value for key, value in records[0]["cell"].items() if key != "seed"},
        "metric": metric,
        "measures": describe(means),
        "seeds": {
            str(record["cell"]["seed"]): {
                measure: own["plug_in"].blocks(measure).mean - own["full_zero_shot"].blocks(measure).mean
                for measure in MEASURES[metric]
            }
            for record, own in zip(records, scores, strict=True)
        },
    }


def _without_seed(record: Mapping[str, Any]) -> dict[str, Any]:
    settings = {
        name: {**part, "seed": None} if isinstance(part, dict) else part for name, part in record["settings"].items()
    }
    return {"of": record["of"], "settings": settings}


def _cell(record: Mapping[str, Any], environments: Sequence[dict[str, Any]]) -> dict[str, Any]:
    scores = _scores(record)
    kept = ("settings", "emulator", "delta_bytes", "seconds", "date", "digest")
    return {
        **record["cell"],
        "metric": scores["plug_in"].metric,
        "measures": describe(scores),
        **{key: record[key] for key in kept},
        "environment": environments.index(record["environment"]),
    }


def _line(entry: Mapping[str, Any], measure: str) -> str:
    found = entry["measures"][measure]
    percent = measure in ("accuracy", "normalised")
    rows = [_number(found["rows"][row]["value"], percent) for row in found["rows"]]
    gain = found["gain"]
    cells = [
        entry["task"],
        f"({entry['plug_in_layers']}, {entry['alpha']:g}, {entry['beta']:g})",
        _TITLES[entry["variant"]],
        str(len(entry["seeds"])),
        *rows,
        _number(found["differences"]["plug_in - emulator_tuned"]["value"], percent, sign=True),
        _with_interval(found["differences"]["plug_in - full_zero_shot"], percent),
        f"{gain['value']:.2f} [{gain['low']:.2f}, {gain['high']:.2f}]" if gain["usable"] else "–",
    ]
    return "| " + " | ".join(cells) + " |"


def _number(value: float, percent: bool, sign: bool = False) -> str:
    text = f"{100 * value:+.1f}" if percent else f"{value:+.3f}"
    return text if sign else text.removeprefix("+")


def _with_interval(found: Mapping[str, float], percent: bool) -> str:
    value, low, high = (_number(found[key], percent, sign=True) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _name(record: Mapping[str, Any]) -> str:
    return " ".join(str(part) for key, part in record["cell"].items() if key != "seed")
