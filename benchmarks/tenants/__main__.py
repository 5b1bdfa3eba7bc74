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
from benchmarks.overhead.subjects import untrained_emulator
from benchmarks.quality.plan import Triplet
from benchmarks.tenants.packing import compare_packing
from scaleot_ray.artifacts import write_artifact
from scaleot_ray.config import EmulatorSettings, ModelSettings, TuneSettings
from scaleot_ray.emulator.assemble import emulator_content
from scaleot_ray.errors import ConfigError
from scaleot_ray.families.loading import load_base_model
from scaleot_ray.stages.record import write_record

SCHEMA = 1
PATHS = ("--model", "--output")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; gives the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return exit_code_of(lambda: _run(given), "Interrupted; nothing was written.")


def _run(given: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.tenants", description=__doc__)
    parser.add_argument("benchmark", choices=["packing"], help="packing: LoRA tuning in one pass")
    parser.add_argument("--model", required=True, help="Hugging Face directory or .gguf file")
    parser.add_argument("--output", required=True, type=Path, help="e.g. benchmarks/results/packing.json")
    parser.add_argument("--settings", default="4,0.5,0.8", help="the emulator's N_a,alpha,beta; default: %(default)s")
    parser.add_argument("--tenants", default="1,2,4,8", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of each data owner")
    parser.add_argument("--repeats", type=int, default=1, help="rounds of all ways")
    parser.add_argument("--batch-size", type=int, default=1, help="of each data owner")
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--note", help="goes into the JSON, e.g. what else ran on the machine")
    options = parser.parse_args(given)
    if options.steps < 2:
        raise ConfigError("--steps: the first step is not timed, so there must be two.", "Give 2 or more.")
    tenants = [int(number) for number in options.tenants.split(",") if number.isdecimal() and int(number)]
    if ",".join(map(str, tenants)) != options.tenants:
        raise ConfigError(f"--tenants: {options.tenants!r} are no numbers of data owners.", "Give e.g. 1,2,4,8.")
    start = time.monotonic()
    threads = use_threads(options.threads)
    triplet = Triplet.parse(options.settings)
    tune = TuneSettings(
        method="lora", steps=options.steps, batch_size=options.batch_size, block_size=options.block_size
    )
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "benchmark": "packing",
        "model": Path(options.model).name,
        "command": portable_command("benchmarks.tenants", given, PATHS),
        "date": now(),
        "note": options.note,
        "environment": environment(),
        "settings": {
            "triplet": str(triplet),
            **{key: getattr(tune, key) for key in ("batch_size", "block_size", "steps", "lora_rank")},
        },
    }
    with tempfile.TemporaryDirectory(prefix="scaleot-tenants-") as folder:
        document["emulator"] = _emulator(options.model, triplet, tune.block_size, Path(folder))
        document["packing"] = compare_packing(Path(folder), tune, tenants, options.repeats, threads, _say)
    document["seconds"] = time.monotonic() - start
    write_record(options.output, document)
    print(_lines(document), end="")
    return 0


def _emulator(model: str, triplet: Triplet, block_size: int, folder: Path) -> dict[str, Any]:
    """Writes the emulator; its process lets the model go, so that those measured have the memory."""
    _say("building the emulator")
    base = load_base_model(ModelSettings(path=model, dtype="float32", device="cpu"))
    settings = EmulatorSettings(plug_in_layers=triplet.plug_in_layers, alpha=triplet.alpha, beta=triplet.beta)
    emulator = untrained_emulator(base, settings, block_size)
    write_artifact(emulator, folder, overwrite=True)
    content = emulator_content(emulator.manifest)
    return {"bytes": emulator.nbytes, "full_bytes": content.full_bytes, "layer_map": content.layer_map}


def _lines(document: dict[str, Any]) -> str:
    rows = ["| data owners | packed ÷ | memory | seconds per step of one |", "|---|---|---|---|"]
    for found in document["packing"]:
        for pair, ratio in found["ratios"].items():
            memory, seconds = ratio["memory"]["median"], ratio["seconds"]["median"]
            rows.append(f"| {found['tenants']} | {pair.partition(' / ')[2]} | {memory:.3f} | {seconds:.3f} |")
    return "\n".join(rows) + f"\n\n`{document['command']}`, {document['seconds'] / 60:.0f} minutes\n"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
