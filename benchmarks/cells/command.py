"""What the command lines of benchmarks made of cells have in common."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.cells.cell import Cell
from benchmarks.cells.document import RUN_FILE, Record, summarise
from benchmarks.cells.runner import CellRunner
from benchmarks.command import exit_code_of, portable_command
from benchmarks.environment import use_threads
from scaleot_ray.errors import ConfigError
from scaleot_ray.stages.record import read_record, write_record

_PATHS = ("--model", "--data", "--output", "--json")


def run_main(given: Sequence[str], run: Callable[[Sequence[str]], int], summary: Callable[[Sequence[str]], int]) -> int:
    """Runs ``summary ...`` or the rest; errors come without a stack trace. Gives the exit code."""
    return exit_code_of(
        lambda: summary(given[1:]) if given[:1] == ["summary"] else run(given),
        "Interrupted. Finished cells are kept; the same command goes on with the others.",
    )


def add_common(parser: argparse.ArgumentParser, tasks: Sequence[str]) -> None:
    """Options of every such benchmark; ``tasks`` are those done by default."""
    parser.add_argument("--model", required=True, help="Hugging Face directory or .gguf file")
    parser.add_argument("--data", required=True, type=Path, help="folder with a folder of Parquet files for each task")
    parser.add_argument("--output", required=True, type=Path, help="folder of cells; 0.4 GB per emulator of SmolLM2")
    parser.add_argument("--tasks", default=",".join(tasks), help="default: %(default)s")
    parser.add_argument("--seeds", default="0", help="default: %(default)s")
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--matmul-precision",
        choices=["highest", "high", "medium"],
        default="highest",
        help="torch.set_float32_matmul_precision: medium multiplies in bf16, twice as fast on CPUs with bf16 units",
    )


def use_processor(options: argparse.Namespace) -> None:
    """Threads and precision as asked for; before the model is loaded."""
    use_threads(options.threads)
    torch.set_float32_matmul_precision(options.matmul_precision)


def numbers(text: str) -> list[int]:
    """``0,1,2`` as numbers.

    Raises:
        ConfigError: it is no such list.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--seeds: {text!r} is no list of whole numbers.", "Write 0,1,2.") from None


def compute(runner: CellRunner, cells: Sequence[Cell], benchmark: str, given: Sequence[str], model: str) -> int:
    """Notes the command in the folder and computes what is missing; gives the exit code."""
    known = read_record(runner.output / RUN_FILE)
    commands = [*known.get("commands", []), command_line(benchmark, given)]
    write_record(runner.output / RUN_FILE, {"model": Path(model).name, "commands": list(dict.fromkeys(commands))})
    runner.announce(cells)
    failed = runner.run(cells)
    if failed:
        print(f"{len(failed)} of {len(cells)} cells failed: {', '.join(failed)}", file=sys.stderr)
    return 5 if failed else 0


def show_summary(
    benchmark: str, given: Sequence[str], order: Callable[[Record], Any], markdown: Callable[[Record], str]
) -> int:
    """``summary --output DIR [--json FILE]``: prints the finished cells and writes their document."""
    parser = argparse.ArgumentParser(f"python -m {benchmark} summary", description="Aggregates finished cells.")
    parser.add_argument("--output", required=True, type=Path, help="folder of the run")
    parser.add_argument("--json", type=Path, help="where the document is written, below benchmarks/results")
    options = parser.parse_args(given)
    document = summarise(options.output, benchmark.rpartition(".")[2], order)
    document["commands"] += [command_line(benchmark, ["summary", *given])]
    if options.json is not None:
        write_record(options.json, document)
    print(markdown(document), end="")
    return 0


def command_line(benchmark: str, given: Sequence[str]) -> str:
    """The command as it may be committed."""
    return portable_command(benchmark, given, _PATHS)
