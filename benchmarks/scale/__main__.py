"""``python -m benchmarks.scale``: an emulator of a random 7B-shaped Llama, built with ``--stream``, tuned a step."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from benchmarks.command import exit_code_of, portable_command
from benchmarks.environment import environment, now, use_threads
from benchmarks.random_text import write_random_text
from benchmarks.scale.checkpoint import Shape, write_checkpoint
from benchmarks.scale.watched_command import Watched, run_scaleot
from scaleot_ray.stages.record import write_record

SCHEMA = 1
PATHS = ("--output", "--json")
BLOCK = 128

_TRIPLET = {"emulator.plug_in_layers": 4, "emulator.alpha": 0.5, "emulator.beta": 0.8}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; gives the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return exit_code_of(lambda: _run(given), "Interrupted. The same command goes on from what is finished.")


def _run(given: list[str]) -> int:
    options = _parser().parse_args(given)
    shape = Shape(**{one.name: getattr(options, one.name) for one in fields(Shape)})
    use_threads(None)
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "benchmark": "scale",
        "command": portable_command("benchmarks.scale", given, PATHS),
        "date": now(),
        "note": options.note,
        "environment": environment(),
    }
    folder = options.output
    size = write_checkpoint(folder / "model", shape, _say)
    write_random_text(folder / "public.jsonl", BLOCK, seed=0, blocks=options.blocks)
    build = run_scaleot(_build_command(folder, options))
    tune = run_scaleot(_tune_command(folder))
    document |= {
        "model": {**asdict(shape), "bytes": size},
        "tokens": {"start": options.start_tokens, "fit": options.fit_tokens},
        "fit_steps": options.fit_steps,
        "build": _figures(build)
        | {
            "parts": build.result["seconds"],
            "seconds_per_layer": {
                part: build.result["seconds"][part] / shape.layers for part in ("stage_one", "emulator")
            },
            "emulator": {key: build.result["artifact"][key] for key in ("bytes", "verbatim_share", "loss_margin")},
        },
        "tune": _figures(tune),
    }
    write_record(options.json, document)
    for name, watched in (("build", build), ("tune", tune)):
        print(f"{name}: {watched.seconds / 60:.0f} minutes, {watched.peak['anonymous'] / 1e9:.1f} GB of its own")
    return 0


def _build_command(folder: Path, options: argparse.Namespace) -> list[str]:
    command = ["build", "--stream", "--dtype", "bfloat16", "--device", "cpu"]
    command += ["--model", str(folder / "model"), "--public", str(folder / "public.jsonl")]
    command += ["--output", str(folder / "emulator"), "--cache", str(folder / "cache"), "--overwrite"]
    values = {
        **_TRIPLET,
        "stage_one.block_size": BLOCK,
        "stage_one.batch_size": options.batch_size,
        "stage_one.start_tokens": options.start_tokens,
        "emulator.fit_tokens": options.fit_tokens,
        "emulator.fit_steps": options.fit_steps,
    }
    for key, value in values.items():
        command += ["--set", f"{key}={value}"]
    return command


def _tune_command(folder: Path) -> list[str]:
    """One step of LoRA on one sequence: that the emulator can be read and tuned."""
    command = ["tune", "--emulator", str(folder / "emulator"), "--train", str(folder / "public.jsonl")]
    command += ["--output", str(folder / "tuned"), "--device", "cpu", "--overwrite"]
    for value in ("method=lora", "steps=1", "batch_size=1", "block_size=64"):
        command += ["--set", f"tune.{value}"]
    return command


def _figures(watched: Watched) -> dict[str, Any]:
    return {"seconds": watched.seconds, "peak_bytes": watched.peak}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--output", required=True, type=Path, help="folder of the checkpoint and of what is made of it")
    parser.add_argument("--json", required=True, type=Path, help="e.g. benchmarks/results/scale.json")
    for one in fields(Shape):
        parser.add_argument(f"--{one.name}", type=int, default=one.default, help="default: %(default)s")
    parser.add_argument("--blocks", type=int, default=96, help=f"of public text, {BLOCK} tokens each; default: 96")
    parser.add_argument("--batch-size", type=int, default=4, help="sequences per batch; default: 4")
    parser.add_argument("--start-tokens", type=int, default=4096, help="of the first pass; default: 4096")
    parser.add_argument("--fit-tokens", type=int, default=4096, help="of the fit; default: 4096")
    parser.add_argument("--fit-steps", type=int, default=20, help="of each kept layer's attention; default: 20")
    parser.add_argument("--note", default="", help="what else ran on the machine")
    return parser


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
