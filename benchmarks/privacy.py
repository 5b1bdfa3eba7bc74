"""``python -m benchmarks.privacy``: what the levels of ``--privacy`` choose and reach on a model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.command import exit_code_of, portable_command
from benchmarks.environment import environment, now, use_threads
from scaleot_ray.cli.bars import ProgressBars
from scaleot_ray.cli.settings import BuildSettings
from scaleot_ray.config import ModelSettings, override, parse
from scaleot_ray.data.demo_text import write_demo_text
from scaleot_ray.emulator.privacy import LEVELS
from scaleot_ray.errors import ConfigError
from scaleot_ray.families.loading import BaseModel, load_base_model
from scaleot_ray.progress import OnProgress
from scaleot_ray.stages.build import build
from scaleot_ray.stages.record import write_record

SCHEMA = 1
PATHS = ("--model", "--public", "--output", "--json")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; gives the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return exit_code_of(lambda: _run(given), "Interrupted. The same command goes on: finished emulators are kept.")


def _run(given: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.privacy", description=__doc__)
    parser.add_argument("--model", required=True, help="Hugging Face directory or .gguf file")
    parser.add_argument("--public", help="the owner's public text; default: that of the demo")
    parser.add_argument("--output", required=True, type=Path, help="folder of stage 1 and of the emulators")
    parser.add_argument("--plug-in-layers", type=int, nargs="+", default=[2, 4, 8], help="N_a; default: 2 4 8")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as `scaleot build --set`")
    parser.add_argument("--threads", type=int, help="default: one per core")
    parser.add_argument("--json", required=True, type=Path, help="e.g. benchmarks/results/privacy.json")
    options = parser.parse_args(given)

    use_threads(options.threads)
    made = environment()
    public = options.public or str(write_demo_text(options.output / "text").public)
    levels = []
    with ProgressBars() as bars:
        base = load_base_model(ModelSettings(path=options.model))
        for count in options.plug_in_layers:
            for level in LEVELS:
                values = {
                    "model": {"path": options.model},
                    "public": {"path": public},
                    "emulator": {"plug_in_layers": count, "privacy": level},
                    "output": str(options.output / f"{count}-{level}"),
                    "cache": str(options.output / "cache"),
                }
                settings = parse(BuildSettings, override(values, options.set), "benchmarks.privacy")
                levels.append({"plug_in_layers": count, **_reached(base, settings, bars)})
    write_record(
        options.json,
        {
            "schema": SCHEMA,
            "benchmark": "privacy",
            "command": portable_command("benchmarks.privacy", given, PATHS),
            "date": now(),
            "environment": made,
            "model": Path(options.model).name,
            "stage_one": settings.stage_one.decisive(),
            "levels": levels,
        },
    )
    return 0


def _reached(base: BaseModel, settings: BuildSettings, on_progress: OnProgress) -> dict[str, Any]:
    """A level, its bounds and every emulator tried, or why none meets it."""
    assert settings.cache is not None
    try:
        built = build(
            base,
            settings.public,
            settings.stage_one,
            settings.emulator,
            Path(settings.output),
            cache=Path(settings.cache),
            resume=True,
            on_progress=on_progress,
        )
    except ConfigError as error:
        return {"level": settings.emulator.privacy, "refused": error.problem}
    assert built.privacy is not None
    return built.privacy


if __name__ == "__main__":
    sys.exit(main())
