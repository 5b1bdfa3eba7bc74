"""``python -m benchmarks.quality``: computes cells; ``python -m benchmarks.quality summary``: makes them one table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.environment import portable_command, use_threads
from benchmarks.quality.plan import BUDGETS, DEFAULT_VARIANTS, VARIANTS, Triplet, cells
from benchmarks.quality.runner import Quality
from benchmarks.quality.summary import RUN_FILE, markdown, summarise
from benchmarks.quality.tasks import TASKS, task_named
from scaleot_ray.cli.failure import explain
from scaleot_ray.errors import ConfigError, ScaleOTError
from scaleot_ray.stages.record import read_record, write_record

PATHS = ("--model", "--data", "--output")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; gives the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _summary(given[1:]) if given[:1] == ["summary"] else _run(given)
    except ScaleOTError as error:
        failure = explain(error)
        print(failure.as_text(), file=sys.stderr)
        return failure.code
    except KeyboardInterrupt:
        print("Interrupted. Finished cells are kept; the same command goes on with the others.", file=sys.stderr)
        return 130


def _run(given: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.quality", description=__doc__)
    parser.add_argument("--model", required=True, help="Hugging Face directory or .gguf file")
    parser.add_argument("--data", required=True, type=Path, help="folder with arc_easy, openbookqa, sst2, wikitext2")
    parser.add_argument("--output", required=True, type=Path, help="folder of cells; 0.4 GB per emulator of SmolLM2")
    parser.add_argument("--tasks", default=",".join(TASKS), help="default: %(default)s")
    parser.add_argument("--seeds", default="0", help="default: %(default)s")
    parser.add_argument("--settings", nargs="+", default=["4,0.5,0.8", "4,0.25,0.8"], help="triplets N_a,alpha,beta")
    parser.add_argument("--variants", default=",".join(DEFAULT_VARIANTS), help="default: %(default)s; also: paper")
    parser.add_argument("--budget", choices=list(BUDGETS), default="full", help="small is about a quarter of full")
    parser.add_argument("--steps", type=int, help="optimizer steps of a tuning run, in place of the budget's")
    parser.add_argument("--stage-one-steps", type=int, help="harmonizer steps of stage 1, in place of the budget's")
    parser.add_argument("--evaluate-examples", type=int, help="test rows or blocks, in place of each task's own")
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--matmul-precision",
        choices=["highest", "high", "medium"],
        default="highest",
        help="torch.set_float32_matmul_precision: medium multiplies in bf16, twice as fast on CPUs with bf16 units",
    )
    options = parser.parse_args(given)
    use_threads(options.threads)
    torch.set_float32_matmul_precision(options.matmul_precision)
    chosen = {"steps": options.steps, "stage_one_steps": options.stage_one_steps}
    budget = replace(BUDGETS[options.budget], **{key: value for key, value in chosen.items() if value is not None})
    tasks, variants = options.tasks.split(","), options.variants.split(",")
    for task in tasks:
        task_named(task)
    unknown = [variant for variant in variants if variant not in VARIANTS]
    if unknown:
        raise ConfigError(f"--variants: there is no {unknown[0]!r}.", f"Take some of {', '.join(VARIANTS)}.")
    planned = list(cells(tasks, _numbers(options.seeds), variants, [Triplet.parse(text) for text in options.settings]))
    benchmark = Quality(options.model, options.data, options.output, budget, options.evaluate_examples, options.device)
    _note_command(options.output, options.model, portable_command("benchmarks.quality", given, PATHS))
    benchmark.announce(planned)
    failed = benchmark.run(planned)
    if failed:
        print(f"{len(failed)} of {len(planned)} cells failed: {', '.join(failed)}", file=sys.stderr)
    return 5 if failed else 0


def _summary(given: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.quality summary", description="Aggregates finished cells.")
    parser.add_argument("--output", required=True, type=Path, help="folder of the run")
    parser.add_argument("--json", type=Path, help="where the document is written, e.g. benchmarks/results/quality.json")
    options = parser.parse_args(given)
    document = summarise(options.output)
    document["commands"] += [portable_command("benchmarks.quality", ["summary", *given], ("--output", "--json"))]
    if options.json is not None:
        write_record(options.json, document)
    print(markdown(document), end="")
    return 0


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--seeds: {text!r} is no list of whole numbers.", "Write 0,1,2.") from None


def _note_command(output: Path, model: str, command: str) -> None:
    known = read_record(output / RUN_FILE)
    commands = [*known.get("commands", []), command]
    write_record(output / RUN_FILE, {"model": Path(model).name, "commands": list(dict.fromkeys(commands))})


if __name__ == "__main__":
    sys.exit(main())
