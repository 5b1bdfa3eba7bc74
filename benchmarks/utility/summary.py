"""Points as a Markdown table per measure: what reached the full model, at what protection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.cells.markdown import gain, number, of_seeds, tables, with_interval

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


def order(facts: Mapping[str, Any]) -> tuple[Any, ...]:
    """Points by kind of task, task and name."""
    return facts["kind"], facts["task"], facts["label"]


def markdown(document: Mapping[str, Any]) -> str:
    """The means over seeds, one table for each measure."""
    legend = (
        "ahead: how far the plug-in is ahead of the tuned emulator, as a share of the full gain. G of all layers: "
        "the same against the full model with every decoder layer tuned."
    )
    return tables(document, _COLUMNS, _row, legend)


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
