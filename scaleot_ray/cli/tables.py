"""The standard table and figures as a person reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

ROW_TITLES = {
    "full_zero_shot": "full zero-shot",
    "emulator_zero_shot": "emulator zero-shot",
    "emulator_tuned": "emulator tuned",
    "plug_in": "plug-in",
    "full_tuned": "full tuned",
}


def show_standard_table(console: Console, tenants: Sequence[Mapping[str, Any]]) -> None:
    """The five rows with one column per tenant, then Δ and the recovered gain G.

    Args:
        console: where to print.
        tenants: objects as :func:`scaleot_ray.evaluation.table.table_json` gives them.
    """
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for tenant in tenants:
        table.add_column(f"{tenant['name']}\n{_unit(tenant['metric'])}", justify="right")
    for row, title in ROW_TITLES.items():
        if any(tenant.get(row) is not None for tenant in tenants):
            table.add_row(title, *(number(tenant.get(row)) for tenant in tenants))
    table.add_section()
    table.add_row("Δ plug-in − emulator tuned", *(number(tenant.get("delta"), signed=True) for tenant in tenants))
    table.add_row("G recovered gain", *(gain_text(tenant.get("gain")) for tenant in tenants))
    console.print(table)
    for tenant in tenants:
        gain = tenant.get("gain")
        if gain and not gain.get("usable") and gain.get("reason"):
            console.print(f"G of {tenant['name']}: {gain['reason']}", style="dim")


def gain_text(gain: Mapping[str, Any] | None) -> str:
    """G with its interval, ``0.43 (0.38 to 0.49)``; a dash where it cannot be said."""
    if not gain or not gain.get("usable") or gain.get("value") is None:
        return "–"
    return f"{gain['value']:.2f} ({gain['low']:.2f} to {gain['high']:.2f})"


def number(value: float | None, signed: bool = False) -> str:
    """Three decimals, or a dash."""
    if value is None:
        return "–"
    return f"{value:+.3f}" if signed else f"{value:.3f}"


def bytes_text(count: float) -> str:
    """Bytes in the unit that suits them: ``41.7 MB`` (decimal units)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _unit(metric: str) -> str:
    return "loss, nats/token ↓" if metric == "loss" else f"{metric} ↑"
