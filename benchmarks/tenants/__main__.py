"""``python -m benchmarks.tenants``: what several data owners on one machine cost, as ratios within one run."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.command import exit_code_of, portable_command
from benchmarks.environment import environment, now, use_threads
from benchmarks.tenants import aggregation, packing, recovery, scaling
from scaleot_ray.interruption import interruptible
from scaleot_ray.stages.record import write_record

SCHEMA = 1
PATHS = ("--model", "--output")
BENCHMARKS: dict[str, Any] = {
    "packing": packing,
    "scaling": scaling,
    "aggregation": aggregation,
    "recovery": recovery,
}
"""Modules with a line of HELP, ``add_options``, ``measure`` and ``lines``."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; gives the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return exit_code_of(lambda: _run(given), "Interrupted; nothing was written.")


def _run(given: list[str]) -> int:
    options = _parser().parse_args(given)
    benchmark, start = BENCHMARKS[options.benchmark], time.monotonic()
    use_threads(options.threads)
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "benchmark": options.benchmark,
        "command": portable_command("benchmarks.tenants", given, PATHS),
        "date": now(),
        "note": options.note,
        "environment": environment(),
    }
    # SIGTERM too must not leave gigabytes in the temporary folder.
    with (
        interruptible("Nothing was written; run the same command again.", "the benchmark"),
        tempfile.TemporaryDirectory(prefix="scaleot-tenants-") as folder,
    ):
        document |= benchmark.measure(options, Path(folder), _say)
    document["seconds"] = time.monotonic() - start
    write_record(options.output, document)
    print("\n".join(benchmark.lines(document)))
    print(f"\n`{document['command']}`, {document['seconds'] / 60:.0f} minutes")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.tenants", description=__doc__)
    commands = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for name, benchmark in BENCHMARKS.items():
        own = commands.add_parser(name, help=benchmark.HELP, description=benchmark.__doc__)
        own.add_argument("--output", required=True, type=Path, help=f"e.g. benchmarks/results/{name}.json")
        own.add_argument("--note", help="goes into the JSON, e.g. what else ran on the machine")
        benchmark.add_options(own)
    return parser


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
