"""Figures as Markdown tables show them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

HEADINGS = {
    "loss": "Loss, nats per token (lower is better)",
    "accuracy": "Accuracy, %",
    "normalised": "Length-normalised accuracy, %",
    "log_likelihood": "Log-likelihood of the right answer, nats (higher is better)",
}
"""Title of each measure's table."""

BRACKETS = "In brackets: 95 % bootstrap interval over test rows, paired where it is a difference or a ratio."


def number(measure: str, value: float, sign: bool = False) -> str:
    """A value of a measure; accuracies as percentages."""
    text = f"{100 * value:+.1f}" if measure in ("accuracy", "normalised") else f"{value:+.3f}"
    return text if sign else text.removeprefix("+")


def with_interval(measure: str, found: Mapping[str, float]) -> str:
    """A difference of a measure with its interval."""
    value, low, high = (number(measure, found[key], sign=True) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def gain(found: Mapping[str, Any]) -> str:
    """G with its interval, or a dash where it cannot be said."""
    return f"{found['value']:.2f} [{found['low']:.2f}, {found['high']:.2f}]" if found["usable"] else "–"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *rows)]
