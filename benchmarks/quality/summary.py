"""The document of the benchmark as Markdown tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.cells.markdown import gain, number, of_seeds, tables, with_interval

_TITLES = {
    "closed_form": "ScaleOT, closed-form start",
    "random_start": "ScaleOT, random start",
    "paper": "ScaleOT, all as in the paper",
    "uniform_drop": "uniform LayerDrop",
}
_COLUMNS = (
    *("task", "(N_a, α, β)", "emulator", "seeds", "margin", "verbatim"),
    *("full zero-shot", "emulator zero-shot", "emulator tuned", "plug-in", "full tuned"),
    *("Δ", "plug-in − full zero-shot", "G", "G by seed"),
)


def order(facts: Mapping[str, Any]) -> tuple[Any, ...]:
    """Cells by task and triplet, the larger α first."""
    return facts["task"], facts["plug_in_layers"], -facts["alpha"], facts["variant"], facts["beta"]


def markdown(document: Mapping[str, Any]) -> str:
    """The means over seeds, one table for each measure."""
    return tables(document, _COLUMNS, _row)


def _row(entry: Mapping[str, Any], measure: str) -> list[str]:
    found = entry["measures"][measure]
    return [
        entry["task"],
        f"({entry['plug_in_layers']}, {entry['alpha']:g}, {entry['beta']:g})",
        _TITLES[entry["variant"]],
        str(len(entry["seeds"])),
        f"{entry['loss_margin']:.2f}",
        f"{100 * entry['verbatim_share']:.0f} %",
        *(number(measure, row["value"]) for row in found["rows"].values()),
        number(measure, found["differences"]["plug_in - emulator_tuned"]["value"], sign=True),
        with_interval(measure, found["differences"]["plug_in - full_zero_shot"]),
        gain(found["gain"]),
        of_seeds(found["gain"]),
    ]
