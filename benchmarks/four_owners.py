"""``python -m benchmarks.four_owners``: four data owners with unlike data, own plug-ins against the aggregate."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.command import exit_code_of
from benchmarks.environment import environment
from benchmarks.run_report import committed
from benchmarks.utility.tasks import prepare, public_text, task_named
from scaleot_ray.cli.output import console
from scaleot_ray.cli.run import show_report
from scaleot_ray.cli.run_table import RunTable
from scaleot_ray.config import ModelSettings, RunSettings, override, parse
from scaleot_ray.families.size import model_size
from scaleot_ray.stages.record import write_record

PATHS = ("--model", "--data", "--output", "--json")
OWNERS = ("python_reference", "wikitext2", "arc_easy", "sst2")
TEST_SHARE = 0.3
"""Of each task's test rows; the small budget of ``benchmarks.utility``."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; gives the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return exit_code_of(lambda: _run(given), "Interrupted. The same command goes on with what is finished.")


def _run(given: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.four_owners", description=__doc__)
    parser.add_argument("--model", required=True, help="Hugging Face directory or .gguf file")
    parser.add_argument("--data", required=True, type=Path, help="folder of the tasks' files")
    parser.add_argument("--output", required=True, type=Path, help="folder of the run")
    parser.add_argument("--json", required=True, type=Path, help="e.g. benchmarks/results/four_owners.json")
    parser.add_argument("--rounds", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as `scaleot run --set`")
    options = parser.parse_args(given)

    from scaleot_ray.artifacts.audit import AuditLog
    from scaleot_ray.federation.run import run_local

    made = environment()
    settings = run_settings(options.model, options.data, options.output, options.rounds, options.set)
    with RunTable([tenant.name for tenant in settings.tenants], settings.rounds.count) as table:
        report = run_local(settings, on_progress=table, on_state=table.change).as_json()
    write_record(options.json, committed("four_owners", report, given, made, PATHS))
    show_report(console(sys.stdout), report, AuditLog(report["audit"]).read())
    return 0


def run_settings(model: str, data: Path, output: Path, rounds: int, changes: Sequence[str]) -> RunSettings:
    """The run, with the package's defaults for all that is not the data's.

    Raises:
        ConfigError: there is no such model, a change names no key, or its value is not what the key takes.
        DataError: a file of a task is missing.
    """
    tenants: list[dict[str, Any]] = []
    folder, context = output / "data", model_size(ModelSettings(path=model)).context
    for name in OWNERS:
        task = task_named(name)
        block_size = min(task.block_size, context or task.block_size)
        train, test = prepare(task, data, folder, round(task.test_rows * TEST_SHARE), block_size)
        tune = {"batch_size": task.batch_size, "block_size": block_size}
        tenants.append({"name": name, "train": train.model_dump(), "test": test.model_dump(), "tune": tune})
    values: dict[str, Any] = {
        "model": {"path": model},
        "public": public_text("mixed", data, folder).model_dump(),
        "tune": {"steps": 20, "too_long": "truncate"},
        "rounds": {"count": rounds},
        "aggregation": {"method": "mean"},
        "tenants": tenants,
        "evaluator": True,
        "output": str(output / "run"),
    }
    return parse(RunSettings, override(values, changes))


if __name__ == "__main__":
    sys.exit(main())
