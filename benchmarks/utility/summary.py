"""Points as a Markdown table per measure: what reached the full model, at what protection."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.utility.document import code_line
from benchmarks.utility.measured import AHEAD, MEASURES

HEADINGS = {
    "loss": "Loss, nats per token (lower is better)",
    "accuracy": "Accuracy, %",
    "normalised": "Length-normalised accuracy, %",
    "log_likelihood": "Log-likelihood of the right answer, nats (higher is better)",
    "log_probability": "Log-probability of the right answer among all, nats (higher is better)",
}
"""Title of each measure's table."""

_COLUMNS = (
    *("task", "point", "seeds", "margin", "verbatim"),
    *(
        "full zero-shot",
        "full tuned",
        "emulator tuned",
        "plug-in",
        "gain",
        "ahead",
        "G",
        "G by seed",
        "G of all layers",
    ),
)

_LEGEND = (
    "ahead: how far the plug-in is ahead of the tuned emulator, as a share of the full gain. G of all layers: the same "
    "against the full model with every decoder layer tuned. In brackets: 95 % bootstrap interval over test rows, "
    "paired where it is a difference or a ratio; it says nothing of other seeds, whose G has a column of its own. "
    "G in parentheses: the plug-in is not ahead of the tuned emulator by "
    f"{100 * AHEAD:.0f} % of the full gain, so it does not count."
)


def markdown(document: Mapping[str, Any]) -> str:
    """The means over seeds, one table for each measure, then what the columns mean, the code and the commands.

    Args:
        document: what :func:`benchmarks.utility.document.summarise` gives.
    """
    entries = document["over_seeds"]
    lines: list[str] = []
    for measure in dict.fromkeys(measure for measures in MEASURES.values() for measure in measures):
        rows = [_row(entry, measure) for entry in entries if measure in entry["measures"]]
        if rows:
            lines += ["", f"**{HEADINGS[measure]}**", "", *table(_COLUMNS, rows)]
    lines += ["", _LEGEND]
    lines += [code_line(document["code"])] if "code" in document else []
    lines += [f"`{command}`" for command in document.get("commands", ())]
    return "\n".join(lines).strip() + "\n"


def _row(entry: Mapping[str, Any], measure: str) -> list[str]:
    found = entry["measures"][measure]
    lead = found["gain"]["ahead"]
    return [
        entry["task"],
        entry["label"],
        str(len(entry["seeds"])),
        f"{entry['loss_margin']:.2f}",
        f"{100 * entry['verbatim_share']:.0f} %",
        *(
            number(measure, found["rows"][row]["value"])
            for row in ("full_zero_shot", "full_tuned", "emulator_tuned", "plug_in")
        ),
        with_interval(measure, found["differences"]["plug_in - full_zero_shot"]),
        "–" if lead is None else f"{100 * lead['value']:.0f} %",
        gain(found["gain"]),
        of_seeds(found["gain"]),
        gain(found["gain_of_all_layers"]) if "gain_of_all_layers" in found else "",
    ]


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
