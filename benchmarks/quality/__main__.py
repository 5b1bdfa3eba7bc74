"""``python -m benchmarks.quality``: computes cells; ``python -m benchmarks.quality summary``: makes them one table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.cells.command import add_common, compute, numbers, run_main, show_summary, use_processor
from benchmarks.cells.runner import CellRunner
from benchmarks.cells.tasks import task_named
from benchmarks.quality.plan import BUDGETS, DEFAULT_VARIANTS, TASKS, VARIANTS, Triplet, choices
from benchmarks.quality.summary import markdown, order
from scaleot_ray.errors import ConfigError

NAME = "benchmarks.quality"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; gives the exit code."""
    return run_main(sys.argv[1:] if arguments is None else arguments, _run, _summary)


def _run(given: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(f"python -m {NAME}", description=__doc__)
    add_common(parser, TASKS)
    parser.add_argument("--settings", nargs="+", default=["4,0.5,0.8", "4,0.25,0.8"], help="triplets N_a,alpha,beta")
    parser.add_argument("--variants", default=",".join(DEFAULT_VARIANTS), help="default: %(default)s; also: paper")
    parser.add_argument("--budget", choices=list(BUDGETS), default="full", help="small is about a quarter of full")
    parser.add_argument("--steps", type=int, help="optimizer steps of a tuning run, in place of the budget's")
    parser.add_argument("--stage-one-steps", type=int, help="harmonizer steps of stage 1, in place of the budget's")
    parser.add_argument("--evaluate-examples", type=int, help="test rows or blocks, in place of each task's own")
    options = parser.parse_args(given)
    given_steps = {"steps": options.steps, "stage_one_steps": options.stage_one_steps}
    budget = replace(BUDGETS[options.budget], **{key: value for key, value in given_steps.items() if value is not None})
    variants = options.variants.split(",")
    tasks = [task_named(task) for task in options.tasks.split(",")]
    unknown = [variant for variant in variants if variant not in VARIANTS]
    if unknown:
        raise ConfigError(f"--variants: there is no {unknown[0]!r}.", f"Take some of {', '.join(VARIANTS)}.")
    chosen = choices(tasks, numbers(options.seeds), variants, [Triplet.parse(text) for text in options.settings])
    use_processor(options)
    runner = CellRunner(options.model, options.data, options.output, options.device)
    cells = [choice.cell(budget, runner.fitting, options.evaluate_examples) for choice in chosen]
    return compute(runner, cells, NAME, given, options.model)


def _summary(given: Sequence[str]) -> int:
    return show_summary(NAME, given, order, markdown)


if __name__ == "__main__":
    sys.exit(main())
