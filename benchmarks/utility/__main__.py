"""``python -m benchmarks.utility``: computes points; ``python -m benchmarks.utility summary``: makes them one table."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.command import exit_code_of, portable_command
from benchmarks.environment import use_threads
from benchmarks.utility.document import RUN_FILE, summarise
from benchmarks.utility.plan import BUDGETS, TASKS, Point, cells
from benchmarks.utility.runner import CellRunner
from benchmarks.utility.summary import markdown
from benchmarks.utility.tasks import PUBLIC, task_named
from scaleot_ray.errors import ConfigError
from scaleot_ray.stages.record import read_record, write_record

NAME = "benchmarks.utility"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; gives the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    return exit_code_of(
        lambda: _summary(given[1:]) if given[:1] == ["summary"] else _run(given),
        "Interrupted. Finished cells are kept; the same command goes on with the others.",
    )


def _options(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(f"python -m {NAME}", description=__doc__)
    parser.add_argument("--model", required=True, help="Hugging Face directory or .gguf file")
    parser.add_argument("--data", required=True, type=Path, help="folder with a folder of Parquet files for each task")
    parser.add_argument("--output", required=True, type=Path, help="folder of cells; 0.4 GB per emulator of SmolLM2")
    parser.add_argument("--tasks", default=",".join(TASKS[:1]), help="default: %(default)s")
    parser.add_argument("--seeds", default="0", help="default: %(default)s")
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--matmul-precision",
        choices=["highest", "high", "medium"],
        default="highest",
        help="torch.set_float32_matmul_precision: medium multiplies in bf16, twice as fast on CPUs with bf16 units",
    )
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
    return parser.parse_args(given)


def _run(given: Sequence[str]) -> int:
    options = _options(given)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", options.label):
        raise ConfigError(f"--label: {options.label!r} is no file name.", "Use letters, digits, '_', '-' and '.'.")
    chosen = {key: getattr(options, key) for key in ("stage_one_tokens", "tuning_tokens", "test_share")}
    budget = replace(BUDGETS[options.budget], **{key: value for key, value in chosen.items() if value is not None})
    point = Point(options.label, options.public, budget, tuple(options.set), options.recipe, options.all_layers)
    point.sections()  # a wrong key shows before the model is loaded
    tasks, seeds = [task_named(task) for task in options.tasks.split(",")], _seeds(options.seeds)
    _one_precision(options)
    use_threads(options.threads)  # before the model is loaded
    torch.set_float32_matmul_precision(options.matmul_precision)
    runner = CellRunner(options.model, options.data, options.output, options.device)
    chosen_cells = cells(point, tasks, seeds, runner)
    _note(options, given)
    runner.announce(chosen_cells)
    failed = runner.run(chosen_cells)
    if failed:
        print(f"{len(failed)} of {len(chosen_cells)} cells failed: {', '.join(failed)}", file=sys.stderr)
    return 5 if failed else 0


def _one_precision(options: argparse.Namespace) -> None:
    """Refuses another precision than the folder's: stage 1 and the full model's rows are kept without theirs."""
    before = read_record(options.output / RUN_FILE).get("matmul_precision", options.matmul_precision)
    if before != options.matmul_precision:
        raise ConfigError(
            f"--matmul-precision: {options.output} was computed with {before}, not {options.matmul_precision}.",
            f"Give --matmul-precision {before}, or another --output.",
        )


def _note(options: argparse.Namespace, given: Sequence[str]) -> None:
    """Writes into the folder what it is made with."""
    commands = [*read_record(options.output / RUN_FILE).get("commands", []), _command_line(given)]
    record = {
        "model": Path(options.model).name,
        "matmul_precision": options.matmul_precision,
        "commands": list(dict.fromkeys(commands)),
    }
    write_record(options.output / RUN_FILE, record)


def _summary(given: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(f"python -m {NAME} summary", description="Aggregates finished cells.")
    parser.add_argument("--output", required=True, type=Path, help="folder of the run")
    parser.add_argument("--json", type=Path, help="where the document is written, below benchmarks/results")
    options = parser.parse_args(given)
    document = summarise(options.output)
    document["commands"] += [_command_line(["summary", *given])]
    if options.json is not None:
        write_record(options.json, document)
    print(markdown(document), end="")
    return 0


def _seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--seeds: {text!r} is no list of whole numbers.", "Write 0,1,2.") from None


def _command_line(given: Sequence[str]) -> str:
    """The command as it may be committed."""
    return portable_command(NAME, given, ("--model", "--data", "--output", "--json"))


if __name__ == "__main__":
    sys.exit(main())
