"""``scaleot doctor``: is this machine ready?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from scaleot_ray.cli.checks import Check, all_checks
from scaleot_ray.cli.options import DebugOption, Format, FormatOption
from scaleot_ray.cli.output import working
from scaleot_ray.errors import ResourcesMissing

if TYPE_CHECKING:
    from rich.console import Console

_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def doctor_command(
    context: typer.Context,
    format: FormatOption = Format.text,
    debug: DebugOption = False,
) -> None:
    """Check this machine: packages, threads, memory, disk, Ray, GPU.

    Reads nothing and writes nothing; it starts a small Ray for a moment. Each
    line is ok, warn or fail, with what to do about it. The exit code is 4 if a
    check fails, else 0.

    Examples:

      scaleot doctor

      scaleot doctor --format json
    """
    with working(context, "Run the same command again.") as out:
        checks: list[Check] = []
        for check in all_checks():
            checks.append(check)
            if out.json:
                out.note(f"{check.name}: {check.status}")
        failed = sum(check.status == "fail" for check in checks)
        document = {
            "schema": "scaleot.doctor/1",
            "ok": not failed,
            "checks": [check.as_json() for check in checks],
        }

        def show(console: Console) -> None:
            from rich.markup import escape

            for check in checks:
                style = _STYLES[check.status]
                console.print(f"[{style}]{check.status:>4}[/]  {escape(check.name):<14}{escape(check.found)}")
                if check.remedy:
                    console.print(f"      [dim]→ {escape(check.remedy)}[/]")

        out.result(document, show)
        if failed:
            raise typer.Exit(ResourcesMissing.exit_code)
