"""``scaleot tenants RUN`` and ``scaleot revoke RUN NAME``: who takes part in a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scaleot_ray.cli.options import DebugOption, Format, FormatOption
from scaleot_ray.cli.output import working
from scaleot_ray.cli.status import RunArgument
from scaleot_ray.cli.tables import cell
from scaleot_ray.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from scaleot_ray.federation.rounds.administration import Action

ReasonOption = Annotated[str, typer.Option("--reason", help="Why; kept in the registry.")]
_NAME = "NAME"


def tenants_command(
    context: typer.Context,
    run: RunArgument,
    pause: Annotated[str, typer.Option(help="Let this data owner start nothing new.", metavar=_NAME)] = "",
    resume: Annotated[str, typer.Option(help="Let it take part again from the next round.", metavar=_NAME)] = "",
    cancel: Annotated[str, typer.Option(help="End its part for good.", metavar=_NAME)] = "",
    reason: ReasonOption = "",
    format: FormatOption = Format.text,
    debug: DebugOption = False,
) -> None:
    """Show the data owners of a run; pause one, let it in again, cancel it.

    Reads the registry. Writes to it with --pause, --resume or --cancel, even
    while the run is under way: a data owner that is tuning then is stopped. What
    a cancelled one has submitted counts; `scaleot revoke` withdraws that too.

    Examples:

      scaleot tenants scaleot-runs/rounds

      scaleot tenants scaleot-runs/rounds --pause bob --reason "new data soon"
    """
    with working(context, "Run the same command again.") as out:
        asked: dict[Action, str] = {"pause": pause, "resume": resume, "cancel": cancel}
        given = {action: name for action, name in asked.items() if name}
        if len(given) > 1:
            raise ConfigError(
                f"{' and '.join(f'--{action}' for action in given)} are given at once.", "Do one after the other."
            )
        for action, name in given.items():
            _administer(run, action, name, reason)
        document = _status(run)
        out.result(document, lambda console: _show(console, document))


def revoke_command(
    context: typer.Context,
    run: RunArgument,
    name: Annotated[str, typer.Argument(help="The data owner.", metavar=_NAME)],
    reason: ReasonOption = "",
    format: FormatOption = Format.text,
    debug: DebugOption = False,
) -> None:
    """Withdraw everything that came from a data owner. This is final.

    Reads and writes the registry of a run, even while it is under way. The data
    owner's plug-ins are removed; every aggregate that it contributed to, and
    those that build on such ones, are made again without it. Nothing more is
    accepted from it. This does not undo that others have begun rounds with such
    an aggregate. The data owner's own folder in the run stays.

    Example:

      scaleot revoke scaleot-runs/rounds carol --reason "withdrew consent"
    """
    with working(context, "Run the same command again; it continues where it was.") as out:
        changed = _administer(run, "revoke", name, reason)
        document = _status(run)
        aggregated = {one["number"] for one in document["rounds"] if one["aggregated"]}
        for number in changed:
            became = f"made anew without {name}" if number in aggregated else f"withdrawn: without {name} there is none"
            out.note(f"The aggregate of round {number} was {became}.")
        out.result(document, lambda console: _show(console, document))


def _administer(run: str, action: Action, name: str, reason: str) -> list[int]:
    from scaleot_ray.federation.folder import RunFolder
    from scaleot_ray.federation.rounds.administration import Request, administer

    return administer(RunFolder(Path(run).expanduser()), Request(action, name, reason))


def _status(run: str) -> dict[str, Any]:
    from scaleot_ray.federation.folder import RunFolder
    from scaleot_ray.federation.rounds.status import run_status

    return run_status(RunFolder(Path(run).expanduser()))


def _show(console: Console, document: Mapping[str, Any]) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("data owner", "state", "submissions", "refused", "plug-in"):
        table.add_column(name, overflow="fold")
    for one in document["tenants"]:
        state = one["state"] + (f" ({one['reason']})" if one["reason"] else "")
        refused = "; ".join(f"{found['count']} × {found['reason']}" for found in one["refusals"])
        plug_in = one["plug_in"]
        made = f"round {plug_in['round']}, {plug_in['digest'][:12]}…" if plug_in else ""
        table.add_row(*map(cell, (one["name"], state, str(one["submissions"]), refused, made)))
    console.print(table)
