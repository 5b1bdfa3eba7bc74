"""``scaleot status RUN``: how far a run is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scaleot_ray.cli.bars import clock
from scaleot_ray.cli.options import DebugOption, Format, FormatOption
from scaleot_ray.cli.output import working
from scaleot_ray.cli.tables import cell

if TYPE_CHECKING:
    from rich.console import Console

RunArgument = Annotated[str, typer.Argument(help="Folder of the run.", metavar="RUN")]


def status_command(
    context: typer.Context,
    run: RunArgument,
    format: FormatOption = Format.text,
    debug: DebugOption = False,
) -> None:
    """Show how far a run is: its rounds, and each data owner in them.

    Reads the registry of a run that is under way or has ended. Writes nothing.
    `scaleot tenants` shows the data owners themselves.

    Examples:

      scaleot status scaleot-runs/rounds

      scaleot status scaleot-runs/rounds --format json
    """
    with working(context, "Run the same command again.") as out:
        from scaleot_ray.federation.folder import RunFolder
        from scaleot_ray.federation.rounds.status import run_status

        document = run_status(RunFolder(Path(run).expanduser()))
        out.result(document, lambda console: _show(console, document))


def _show(console: Console, document: Mapping[str, Any]) -> None:
    from rich import box
    from rich.table import Table

    state = "is under way" if document["under_way"] else "is not under way"
    console.print(f"{document['directory']} {state}; emulator {document['emulator'][:12]}…", markup=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("round", "state", "took", "data owner", "state", "started", "why"):
        table.add_column(name)
    for one in document["rounds"]:
        took = clock(one["ended"] - one["opened"]) if one["ended"] else ""
        first = (str(one["number"]), one["state"], took)
        for number, part in enumerate(one["tenants"]):
            times = f"{part['attempts']} ×" if part["attempts"] else ""
            cells = (part["name"], part["state"], times, part["reason"] or "")
            table.add_row(*(first if not number else ("", "", "")), *map(cell, cells))
        if one["reason"]:
            table.add_row("", "", "", "", "", "", cell(one["reason"]))
    console.print(table)
    if document["aggregate"]:
        found = document["aggregate"]
        console.print(f"aggregate of round {found['round']}: {found['directory']}", markup=False, soft_wrap=True)
