"""A document of cells as Markdown: one table per measure, and how figures look in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks.cells.document import code_line
from benchmarks.cells.measured import AHEAD, MEASURES

HEADINGS = {
    "loss": "Loss, nats per token (lower is better)",
    "accuracy": "Accuracy, %",
    "normalised": "Length-normalised accuracy, %",
    "log_likelihood": "Log-likelihood of the right answer, nats (higher is better)",
    "log_probability": "Log-probability of the right answer among all, nats (higher is better)",
}
"""Title of each measure's table."""

BRACKETS = (
    "In brackets: 95 % bootstrap interval over test rows, paired where it is a difference or a ratio; it says nothing "
    "of other seeds, whose G has a column of its own. G in parentheses: the plug-in is not ahead of the tuned emulator "
    f"by {100 * AHEAD:.0f} % of the full gain, so it does not count."
)


def tables(
    document: Mapping[str, Any],
    columns: Sequence[str],
    row: Callable[[Mapping[str, Any], str], Sequence[str]],
    legend: str = "",
) -> str:
    """The means over seeds, one table for each measure, then what the columns mean and the commands.

    Args:
        document: what :func:`benchmarks.cells.document.summarise` gives.
        columns: headings.
        row: the cells of a line, from an entry and a measure's name.
        legend: said below the tables, before what brackets mean.
    """
    entries = document["over_seeds"]
    lines: list[str] = []
    for measure in dict.fromkeys(measure for measures in MEASURES.values() for measure in measures):
        rows = [row(entry, measure) for entry in entries if measure in entry["measures"]]
        if rows:
            lines += ["", f"**{HEADINGS[measure]}**", "", *table(columns, rows)]
    lines += ["", f"{legend} {BRACKETS}".strip()]
    lines += [code_line(document["code"])] if "code" in document else []
    lines += [f"`{command}`" for command in document.get("commands", ())]
    return "\n".join(lines).strip() + "\n"


def number(measure: str, value: float, sign: bool = False) -> str:
    """A value of a measure; accuracies as percentages."""
    text = f"{100 * value:+.1f}" if measure in ("accuracy", "normalised") else f"{value:+.3f}"
    return text if sign else text.removeprefix("+")


def with_interval(measure: str, found: Mapping[str, float]) -> str:
    """A difference of a measure with its interval."""
    value, low, high = (number(measure, found[key], sign=True) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def gain(found: Mapping[str, Any]) -> str:
    """G with its interval, in parentheses where it does not count, or a dash where it cannot be said."""
    if not found["usable"]:
        return "–"
    text = f"{found['value']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"
    return text if found["counts"] else f"({text})"


def of_seeds(found: Mapping[str, Any]) -> str:
    """The smallest and the largest G of single seeds; empty for one seed."""
    values = [value for value in found["seeds"].values() if value is not None]
    return f"{min(values):.2f} to {max(values):.2f}" if len(values) > 1 else ""


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *rows)]
