"""``python -m benchmarks.demo``: the demo from an empty folder, its table, and its report as it may be committed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.command import exit_code_of
from benchmarks.environment import environment
from benchmarks.run_report import committed
from scaleot_ray.cli.demo import demo_settings, forget
from scaleot_ray.cli.output import console
from scaleot_ray.cli.run import show_report
from scaleot_ray.cli.run_table import RunTable
from scaleot_ray.stages.record import write_record

PATHS = ("--model", "--output", "--json")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; gives the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return exit_code_of(lambda: _run(given), "Interrupted; nothing was written. The same command starts over.")


def _run(given: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.demo", description=__doc__)
    parser.add_argument("--model", help="Hugging Face directory or .gguf file; default: SmolLM2 from `make demo`")
    parser.add_argument("--output", default="scaleot-runs/demo", help="folder of the run; default: %(default)s")
    parser.add_argument("--json", required=True, type=Path, help="e.g. benchmarks/results/demo.json")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as `scaleot demo --set`")
    options = parser.parse_args(given)

    from scaleot_ray.artifacts.audit import AuditLog
    from scaleot_ray.federation.folder import RunFolder
    from scaleot_ray.federation.run import run_local

    made = environment()
    settings = demo_settings(options.model, Path(options.output), options.set)
    forget(Path(options.output))
    audit = AuditLog(RunFolder(Path(options.output)).audit)
    before = len(audit.read())
    with RunTable([tenant.name for tenant in settings.tenants], settings.rounds.count) as table:
        report = run_local(settings, on_progress=table, on_state=table.change).as_json()
    write_record(options.json, committed("demo", report, given, made, PATHS))
    show_report(console(sys.stdout), report, audit.read()[before:])
    return 0


if __name__ == "__main__":
    sys.exit(main())
