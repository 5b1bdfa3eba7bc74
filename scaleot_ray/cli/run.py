"""``scaleot run CONFIG.yaml``: a whole run on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scaleot_ray.cli.bars import ProgressBars, clock
from scaleot_ray.cli.options import DebugOption, Format, FormatOption, SetOption
from scaleot_ray.cli.output import Output, working
from scaleot_ray.cli.tables import bytes_text, show_standard_table
from scaleot_ray.config import RunSettings, load_yaml

if TYPE_CHECKING:
    from rich.console import Console


def run_command(
    context: typer.Context,
    config: Annotated[str, typer.Argument(help="YAML file of the run.", metavar="CONFIG.yaml")],
    overrides: SetOption = [],  # noqa: B006  typer copies it
    format: FormatOption = Format.text,
    debug: DebugOption = False,
) -> None:
    """Run what a YAML file describes: build, tune, plug in, evaluate.

    Reads the file (examples/ has some; docs/configuration.md lists every key) and
    what it names. All data owners tune at the same time. Writes artefacts, audit
    log and report to the folder that its key output names. Starts a Ray of its
    own on this machine and stops it at the end.

    Examples:

      scaleot run examples/two_owners.yaml

      scaleot run examples/two_owners.yaml --set emulator.alpha=0.25 --format json
    """
    with working(context, "Run the same command again: finished parts are reused, the rest goes on.") as out:
        run(load_yaml(RunSettings, config, overrides), out)


def run(settings: RunSettings, out: Output) -> None:
    """Runs and shows the report (``scaleot run`` and ``scaleot demo`` alike)."""
    from scaleot_ray.federation.run import run_local

    with ProgressBars() as bars:
        report = run_local(settings, on_progress=bars)
    document = report.as_json()
    out.result(document, lambda console: show_report(console, document))


def show_report(console: Console, report: Mapping[str, Any]) -> None:
    """A run's report as a person reads it: the emulator, the standard table, what left each party.

    Args:
        console: where to print.
        report: the object of docs/json.md, schema ``scaleot.run/1``.
    """
    emulator = report["emulator"]
    margin = emulator.get("loss_margin")
    console.print(
        f"emulator: {emulator['replaced_layers']} layers replaced, "
        f"α {emulator['alpha']:.2g}, β {emulator['beta']:.2g}; "
        f"{bytes_text(emulator['bytes'])} of {bytes_text(emulator['full_bytes'])}, "
        f"{emulator['verbatim_share']:.0%} of the parameters verbatim"
        + (f", {margin:.2f} nats worse than the full model on public text" if margin is not None else "")
    )
    show_standard_table(console, report["tenants"])
    for line in crossings(report["audit"]):
        console.print(line)
    seconds = report["seconds"]
    console.print(
        f"{clock(seconds['total'])} in all; peak memory of all processes {bytes_text(report['peak_rss_bytes'])}; "
        f"audit log {report['audit']}"
    )


def crossings(audit: str | Path) -> list[str]:
    """One line per party: what it sent to whom, out of the audit log."""
    from scaleot_ray.artifacts.audit import AuditLog

    sent: dict[str, dict[tuple[str, str], int]] = {}
    for entry in AuditLog(Path(audit)).read():
        if entry["decision"] == "sent":
            to = sent.setdefault(entry["sender"], {})
            key = (entry["kind"], entry["recipient"])
            to[key] = to.get(key, 0) + entry["bytes"]
    return [
        f"left {sender}: " + ", ".join(f"{kind} to {to} {bytes_text(count)}" for (kind, to), count in items.items())
        for sender, items in sent.items()
    ]
