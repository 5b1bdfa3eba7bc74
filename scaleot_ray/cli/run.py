"""``scaleot run CONFIG.yaml``: a whole run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scaleot_ray.cli.bars import clock
from scaleot_ray.cli.options import DebugOption, Format, FormatOption, set_option
from scaleot_ray.cli.output import Output, working
from scaleot_ray.cli.run_table import RunTable
from scaleot_ray.cli.tables import bytes_text, margin_text, privacy_text, show_standard_table
from scaleot_ray.config import RunSettings, load_yaml
from scaleot_ray.plain_text import plain_line

if TYPE_CHECKING:
    from rich.console import Console


def run_command(
    context: typer.Context,
    config: Annotated[str, typer.Argument(help="YAML file of the run.", metavar="CONFIG.yaml")],
    overrides: Annotated[list[str], set_option("tune.learning_rate=5e-5")] = [],  # noqa: B006  typer copies it
    format: FormatOption = Format.text,
    debug: DebugOption = False,
) -> None:
    """Run what a YAML file describes: build, tune, aggregate, evaluate.

    Reads the file (examples/ has some; docs/configuration.md lists every key) and
    what it names. Data owners tune at the same time, at most tenants_at_once or
    as many as fit; on a terminal a table shows what each does. Writes emulator,
    deltas, audit log and report to the folder that its key output names. It
    writes no checkpoint of the tuned model: scaleot plug makes one from a delta.
    Starts a Ray of its own on this machine and stops it at the end, unless
    RAY_ADDRESS names one; environment: cluster needs one that is there.

    Examples:

      scaleot run examples/two_owners.yaml

      scaleot run examples/two_owners.yaml --set emulator.alpha=0.25 --format json
    """
    with working(context, "Run the same command again: finished parts are reused, the rest goes on.") as out:
        run(load_yaml(RunSettings, config, overrides), out)


def run(settings: RunSettings, out: Output) -> None:
    """Runs and shows the report (``scaleot run`` and ``scaleot demo`` alike)."""
    with RunTable([tenant.name for tenant in settings.tenants], settings.rounds.count) as table:
        from scaleot_ray.artifacts.audit import AuditLog
        from scaleot_ray.federation.folder import RunFolder
        from scaleot_ray.federation.run import run_local

        audit = AuditLog(RunFolder(Path(settings.output).expanduser()).audit)
        before = len(audit.read())
        report = run_local(settings, on_progress=table, on_state=table.change, debug=out.debug)
    document = report.as_json()
    out.result(document, lambda console: show_report(console, document, audit.read()[before:]))


def show_report(console: Console, report: Mapping[str, Any], crossed: Sequence[Mapping[str, Any]]) -> None:
    """A run's report as a person reads it: the emulator, the standard table, what left each party.

    Args:
        console: where to print.
        report: the object of docs/json.md, schema ``scaleot.run/1``.
        crossed: the run's lines of the audit log.
    """
    emulator, seconds = report["emulator"], report["seconds"]
    for line in emulator_lines(emulator):
        console.print(plain_line(line), markup=False, soft_wrap=True)
    show_standard_table(console, report["tenants"])
    for line in round_lines(report["rounds"], report["aggregate"]) + unmeasured_lines(report["tenants"]):
        console.print(plain_line(line), markup=False, soft_wrap=True)
    for line in crossings(crossed):
        console.print(plain_line(line), markup=False, soft_wrap=True)
    console.print(
        f"{clock(seconds['total'])} in all, peak memory of all processes {bytes_text(report['peak_rss_bytes'])}; "
        f"everything is in {_from_here(report['directory'])}",
        markup=False,
        soft_wrap=True,
    )


def _from_here(directory: str) -> str:
    """A path as short as it can be typed in the present folder."""
    try:
        path, here = Path(directory), Path.cwd()
    except FileNotFoundError:  # a job's working folder may be gone by the time it ends
        return directory
    return str(path.relative_to(here)) if path.is_relative_to(here) else directory


def emulator_lines(emulator: Mapping[str, Any]) -> list[str]:
    """What the emulator is, what it reveals, and how a privacy level was met."""
    hidden = len(emulator["replaced_layers"]) + len(emulator["dropped_layers"])
    lines = [
        f"emulator: {hidden} of {len(emulator['layer_map'])} layers replaced (α {emulator['alpha']:g}, "
        f"β {emulator['beta']:g}), {bytes_text(emulator['bytes'])} of {bytes_text(emulator['full_bytes'])}",
        f"it reveals: {emulator['verbatim_share']:.0%} of the parameters verbatim"
        + margin_text(emulator["loss_margin"]),
    ]
    if emulator["privacy"] is not None:
        lines.append(privacy_text(emulator["privacy"]))
    return lines


def round_lines(rounds: Sequence[Mapping[str, Any]], aggregate: Mapping[str, Any] | None) -> list[str]:
    """Who was missing in which round, and where the aggregate is."""
    lines = [
        f"round {one['number']} went on without {name}: {reason}"
        for one in rounds
        for name, reason in one["missing"].items()
    ]
    if aggregate is not None:
        lines.append(
            f"aggregate of round {aggregate['round']} by {aggregate['settings']['method']}: "
            f"{_from_here(aggregate['directory'])}"
        )
    return lines


def unmeasured_lines(tenants: Sequence[Mapping[str, Any]]) -> list[str]:
    """Whose rows of the table are missing because they could not be measured, and why."""
    return [
        f"rows of {one['name']} are missing: {one['unmeasured']}" for one in tenants if one["unmeasured"] is not None
    ]


def crossings(crossed: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line per sender with what it sent to whom; what a declared evaluator got has a line of its own."""
    sent: dict[str, list[str]] = {}
    for entry in crossed:
        # The numbers of a metrics artefact are in its manifest, which is not counted.
        what = f"{entry['kind']} {bytes_text(entry['bytes'])}" if entry["bytes"] else entry["kind"]
        if entry["decision"] == "refused":
            what += f" (refused: {entry['reason']})"
        if entry["recipient"].startswith("evaluator"):
            sent.setdefault(f"{entry['recipient']}, declared in the settings, got", []).append(
                f"{what} from {entry['sender']}"
            )
        else:
            sent.setdefault(f"left {entry['sender']}", []).append(f"{what} to {entry['recipient']}")
    return [f"{who}: {', '.join(items)}" for who, items in sorted(sent.items(), reverse=True)]
