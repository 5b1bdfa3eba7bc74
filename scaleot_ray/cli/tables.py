"""The standard table and figures as a person reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from scaleot_ray.plain_text import plain_line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

ROW_TITLES = {
    "full_zero_shot": "full zero-shot",
    "emulator_zero_shot": "emulator zero-shot",
    "emulator_tuned": "emulator tuned",
    "plug_in": "plug-in",
    "full_tuned": "full tuned",
    "aggregate": "aggregated plug-in",
}


MEASURES = {
    "loss": "loss, nats/token ↓",
    "accuracy": "accuracy ↑",
    "normalised": "accuracy, length-normalised ↑",
    "log_likelihood": "log-likelihood of right answer, nats ↑",
    "log_probability": "log-probability of right answer among all, nats ↑",
}


def show_standard_table(console: Console, tenants: Sequence[Mapping[str, Any]]) -> None:
    """The five rows with one column per tenant, then Δ and the recovered gain G.

    A loss has its perplexity in brackets. Multiple-choice tenants get the same rows once more for each of
    their further measures.

    Args:
        console: where to print.
        tenants: objects as :func:`scaleot_ray.evaluation.table.table_json` gives them.
    """
    _show_table(console, [(tenant["name"], tenant["metric"], tenant) for tenant in tenants])
    for measure in ("normalised", "log_likelihood", "log_probability"):
        further = [(tenant["name"], measure, tenant[measure]) for tenant in tenants if tenant.get(measure)]
        if further:
            _show_table(console, further)
    for tenant in tenants:
        gain = tenant.get("gain") or {}
        if tenant.get("full_tuned") is not None and not gain.get("usable") and gain.get("reason"):
            console.print(cell(f"G of {tenant['name']}: {gain['reason']}"), style="dim")


def _show_table(console: Console, columns: Sequence[tuple[str, str, Mapping[str, Any]]]) -> None:
    from rich import box
    from rich.table import Table

    rows = [row for row in ROW_TITLES if any(values.get(row) is not None for _, _, values in columns)]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    cells = []
    for name, measure, values in columns:
        title = "loss, nats ↓ (perplexity)" if "perplexity" in values else MEASURES.get(measure, measure)
        table.add_column(cell(name) + f"\n{title}", justify="right")
        gains = (gain_text(values.get("gain")), gain_text(values.get("aggregate_gain")))
        cells.append([*(score_text(values, row) for row in rows), delta_text(values), *gains])
    *scores, delta, gain, gain_in_common = zip(*cells, strict=True)
    for row, texts in zip(rows, scores, strict=True):
        table.add_row(ROW_TITLES[row], *texts)
    table.add_section()
    if any(values.get("delta") is not None for _, _, values in columns):
        table.add_row("Δ to emulator tuned", *delta)
    if any(values.get("full_tuned") is not None for _, _, values in columns):
        table.add_row("G recovered gain", *gain)
    if any(values.get("aggregate_gain") is not None for _, _, values in columns):
        table.add_row("G of the aggregate", *gain_in_common)
    console.print(table)


def cell(text: str) -> Text:
    """What another party may have written, as it is: no markup, no control characters, one line."""
    from rich.text import Text

    return Text(plain_line(text))


def delta_text(values: Mapping[str, Any]) -> str:
    """Δ with its interval where there is one, ``-0.50 (-0.53 to -0.47)``; a dash where it is not known."""
    delta, interval = values.get("delta"), values.get("delta_interval")
    if delta is None:
        return "–"
    return f"{delta:+.3f} ({interval[0]:+.3f} to {interval[1]:+.3f})" if interval else f"{delta:+.3f}"


def gain_text(gain: Mapping[str, Any] | None) -> str:
    """G with its interval, ``0.43 (0.38 to 0.49)``; a dash where it cannot be said."""
    if not gain or not gain.get("usable") or gain.get("value") is None:
        return "–"
    return f"{gain['value']:.2f} ({gain['low']:.2f} to {gain['high']:.2f})"


def margin_text(margin: float | None) -> str:
    """The loss margin as the end of a sentence; nothing where it was not measured."""
    return "" if margin is None else f", a loss {margin:.2f} nats above the full model's on public text"


def privacy_text(privacy: Mapping[str, Any]) -> str:
    """What a privacy level asks for, and what was reached."""
    reached = privacy["tried"][-1]
    return (
        f"privacy {privacy['level']} asks for a loss margin of at least {privacy['minimum_margin']:g} nats and at most "
        f"{privacy['maximum_verbatim']:.0%} verbatim; reached with α {reached['alpha']:g}, β {reached['beta']:g}: "
        f"{reached['loss_margin']:.2f} nats, {reached['safe_margin']:.2f} less two standard errors, "
        f"and {reached['verbatim_share']:.0%}"
    )


def score_text(values: Mapping[str, Any], row: str) -> str:
    """A row's value, and in brackets the perplexity that a loss means: ``3.001 (20.1)``."""
    perplexity = (values.get("perplexity") or {}).get(row)
    beside = f" ({perplexity_text(perplexity)})" if perplexity is not None else ""
    return number(values.get(row)) + beside


def number(value: float | None) -> str:
    """Three decimals, or a dash."""
    return "–" if value is None else f"{value:.3f}"


def perplexity_text(value: float) -> str:
    """About three digits, ``20.1`` or ``1234``."""
    digits = 2 if value < 10 else 1 if value < 1000 else 0
    return f"{value:.{digits}f}" if value < 1e6 else f"{value:.1e}"


def bytes_text(count: float) -> str:
    """Bytes in the unit that suits them: ``41.7 MB`` (decimal units)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
