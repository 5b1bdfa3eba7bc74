"""``python -m benchmarks.utility``: computes points; ``python -m benchmarks.utility summary``: makes them one table."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.cells.command import add_common, compute, numbers, run_main, show_summary, use_processor
from benchmarks.cells.runner import CellRunner
from benchmarks.cells.tasks import PUBLIC, task_named
from benchmarks.utility.plan import BUDGETS, TASKS, Point, cells
from benchmarks.utility.summary import markdown, order
from scaleot_ray.errors import ConfigError

NAME = "benchmarks.utility"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; gives the exit code."""
    return run_main(sys.argv[1:] if arguments is None else arguments, _run, _summary)


def _run(given: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(f"python -m {NAME}", description=__doc__)
    add_common(parser, TASKS[:1])
    parser.add_argument("--label", default="defaults", help="name of the point; default: %(default)s")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="what differs from the package's defaults, e.g. stage_one.objective=lm; may be repeated",
    )
    parser.add_argument(
        "--recipe", choices=["default", "paper"], default="default", help="paper: the paper's own choices"
    )
    parser.add_argument("--public", choices=PUBLIC, default="python", help="the owner's text; default: %(default)s")
    parser.add_argument("--budget", choices=list(BUDGETS), default="small", help="default: %(default)s")
    parser.add_argument("--stage-one-tokens", type=int, help="in place of the budget's")
    parser.add_argument("--tuning-tokens", type=int, help="in place of the budget's")
    parser.add_argument("--test-share", type=float, help="share of each task's test rows, in place of the budget's")
    parser.add_argument(
        "--all-layers",
        action="store_true",
        help="also tune all decoder layers of the full model, for G as papers give it; once per task and seed",
    )
    options = parser.parse_args(given)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", options.label):
        raise ConfigError(f"--label: {options.label!r} is no file name.", "Use letters, digits, '_', '-' and '.'.")
    chosen = {key: getattr(options, key) for key in ("stage_one_tokens", "tuning_tokens", "test_share")}
    budget = replace(BUDGETS[options.budget], **{key: value for key, value in chosen.items() if value is not None})
    point = Point(options.label, options.public, budget, tuple(options.set), options.recipe, options.all_layers)
    point.sections()  # a wrong key shows before the model is loaded
    tasks, seeds = [task_named(task) for task in options.tasks.split(",")], numbers(options.seeds)
    use_processor(options)
    runner = CellRunner(options.model, options.data, options.output, options.device)
    return compute(runner, cells(point, tasks, seeds, runner), NAME, given, options.model)


def _summary(given: Sequence[str]) -> int:
    return show_summary(NAME, given, order, markdown)


if __name__ == "__main__":
    sys.exit(main())
