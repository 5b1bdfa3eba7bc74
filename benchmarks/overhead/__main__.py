"""``python -m benchmarks.overhead``: what tuning, memory and transport cost, as ratios within one run."""

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
from benchmarks.overhead.costs import compare_costs
from benchmarks.overhead.object_store import compare_object_store
from benchmarks.overhead.subjects import triplet, untrained_emulator, whole_model
from benchmarks.overhead.trainer import compare_trainers
from scaleot_ray.artifacts import Artifact, read_artifact, write_artifact
from scaleot_ray.config import EmulatorSettings, ModelSettings, TuneSettings
from scaleot_ray.emulator.assemble import emulator_content
from scaleot_ray.errors import ConfigError
from scaleot_ray.families.loading import load_base_model
from scaleot_ray.stages.record import write_record

SCHEMA = 1
PARTS = ("trainer", "costs", "object_store")
PATHS = ("--model", "--output")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; gives the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return exit_code_of(lambda: _run(given), "Interrupted; nothing was written.")


def _run(given: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("--model", required=True, help="Hugging Face directory or .gguf file")
    parser.add_argument("--output", required=True, type=Path, help="e.g. benchmarks/results/overhead.json")
    parser.add_argument("--settings", default="4,0.5,0.8", help="the emulator's N_a,alpha,beta; default: %(default)s")
    parser.add_argument("--parts", default=",".join(PARTS), help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps of each measurement")
    parser.add_argument("--pairs", type=int, default=5, help="measurements of the trainer and of the bare loop")
    parser.add_argument("--repeats", type=int, default=2, help="rounds of all ways of tuning")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of put and get")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--threads", type=int, help="default: all cores")
    options = parser.parse_args(given)
    parts = options.parts.split(",")
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise ConfigError(f"--parts: there is no {unknown[0]!r}.", f"Take some of {', '.join(PARTS)}.")
    if options.steps < 2:
        raise ConfigError("--steps: the first step is not timed, so there must be two.", "Give 2 or more.")
    start = time.monotonic()
    threads = use_threads(options.threads)
    settings = triplet(options.settings)
    tune = TuneSettings(steps=options.steps, batch_size=options.batch_size, block_size=options.block_size)
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "benchmark": "overhead",
        "model": Path(options.model).name,
        "command": portable_command("benchmarks.overhead", given, PATHS),
        "date": now(),
        "environment": environment(),
        "settings": {"triplet": options.settings, "batch_size": tune.batch_size, "block_size": tune.block_size},
    }
    with tempfile.TemporaryDirectory(prefix="scaleot-overhead-") as folder:
        emulator = _subjects(options.model, settings, tune.block_size, Path(folder), whole="costs" in parts)
        content = emulator_content(emulator.manifest)
        document["emulator"] = {
            "bytes": emulator.nbytes,
            "full_bytes": content.full_bytes,
            "layer_map": content.layer_map,
        }
        if "object_store" in parts:
            document["object_store"] = compare_object_store(emulator, options.rounds, _say)
        if "trainer" in parts:
            document["trainer"] = compare_trainers(emulator, tune, options.pairs, _say)
        del emulator  # the processes below have the machine to themselves
        if "costs" in parts:
            places = Path(folder) / "emulator", Path(folder) / "full"
            document["costs"] = compare_costs(*places, tune, options.repeats, threads, _say)
    document["seconds"] = time.monotonic() - start
    write_record(options.output, document)
    print(_lines(document), end="")
    return 0


def _subjects(model: str, settings: EmulatorSettings, block_size: int, folder: Path, whole: bool) -> Artifact:
    """Writes the emulator (and the full model) as artefacts; gives the emulator, and lets the model go."""
    _say("building the emulator")
    base = load_base_model(ModelSettings(path=model, dtype="float32", device="cpu"))
    write_artifact(untrained_emulator(base, settings, block_size), folder / "emulator")
    if whole:
        write_artifact(whole_model(base, settings.plug_in_layers), folder / "full")
    return read_artifact(folder / "emulator", expected_kind="emulator")


def _lines(document: dict[str, Any]) -> str:
    rows = ["| figure | median | range |", "|---|---|---|"]
    if "trainer" in document:
        rows.append(_row("tuning / bare loop, tokens/s", document["trainer"]["ratio"]))
    for pair, found in document.get("costs", {}).get("ratios", {}).items():
        rows += [_row(f"{pair}, tokens/s", found["speed"]), _row(f"{pair}, peak memory", found["memory"])]
    for pair, found in document.get("object_store", {}).get("ratios", {}).items():
        rows.append(_row(f"{pair}, seconds", found))
    return "\n".join(rows) + f"\n\n`{document['command']}`, {document['seconds'] / 60:.0f} minutes\n"


def _row(name: str, found: dict[str, Any]) -> str:
    return f"| {name} | {found['median']:.3f} | {found['low']:.3f} – {found['high']:.3f} |"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
