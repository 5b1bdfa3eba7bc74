"""Some data owners' LoRA tuning in one process: together in one pass, or one after the other. Prints JSON lines.

The process loads the emulator, prints ``ready``, waits for a line on its standard input, tunes, and prints one
JSON object; so several of them begin at once, and loading is left out of what is measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch

from benchmarks.environment import use_threads
from benchmarks.overhead.process_memory import forget_peak, peak_bytes
from benchmarks.overhead.subjects import random_batches
from scaleot_ray.artifacts import Artifact, read_artifact
from scaleot_ray.artifacts.storage import read_manifest
from scaleot_ray.config import TuneSettings
from scaleot_ray.emulator.assemble import assemble, emulator_content
from scaleot_ray.errors import RunFailed
from scaleot_ray.families import family_of
from scaleot_ray.stages.limits import vocabulary_size
from scaleot_ray.tuning import tune
from scaleot_ray.tuning.packed import PackedTenant, tune_packed

READY = "ready"


def tune_tenants(
    emulator: Artifact, settings: TuneSettings, tenants: int, packed: bool, wait: Callable[[], None]
) -> dict[str, Any]:
    """Tunes ``tenants`` data owners on random tokens, each with a seed of its own.

    Args:
        emulator: what is tuned.
        settings: steps (at least two: the first is not timed), batch, block size, rank.
        tenants: how many.
        packed: in one pass; else one after the other on the same model.
        wait: called when all is loaded.

    Returns:
        ``seconds`` from the first step's end to the last's (one after the other: the sum), ``peak_rss`` of the
        process while tuning, ``peak_from_start`` if loading could not be left out, the last ``losses``.
    """
    model = assemble(emulator)
    family, positions = family_of(model.config), emulator_content(emulator.manifest).plug_in_positions
    marks: list[list[float]] = [[] for _ in range(tenants)]
    owners = [
        PackedTenant(
            str(number),
            random_batches(vocabulary_size(model), settings.batch_size, settings.block_size, number),
            settings.model_copy(update={"seed": number}),
            on_progress=lambda _, own=marks[number]: own.append(time.perf_counter()),
        )
        for number in range(tenants)
    ]
    losses: dict[str, float] = {}
    wait()
    only_tuning = forget_peak()
    if packed:
        tune_packed(
            model,
            family,
            positions,
            owners,
            finished=lambda name, tuned: losses.update({name: tuned.history.losses[-1]}),
            failed=_fail,
        )
        seconds = max(own[-1] for own in marks) - max(own[0] for own in marks)
    else:
        for owner in owners:
            options = {"on_progress": owner.on_progress}
            tuned = tune(model, family, positions, owner.batches, owner.settings, **options)
            losses[owner.name] = tuned.history.losses[-1]
        seconds = sum(own[-1] - own[0] for own in marks)
    return {
        "seconds": seconds,
        "peak_rss": peak_bytes(),
        "peak_from_start": not only_tuning,
        "losses": [losses[str(number)] for number in range(tenants)],
    }


def mapped_artifact(directory: Path) -> Artifact:
    """The artefact with its tensors mapped from the file, so that processes share them as in Ray's object store."""
    tensors: dict[str, Any] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= safetensors.torch.load_file(path)
    return Artifact(read_manifest(directory), tensors, {})


def main() -> int:
    """Tunes on an emulator on disk."""
    parser = argparse.ArgumentParser("python -m benchmarks.tenants.tune_tenants", description=__doc__)
    parser.add_argument("--artifact", required=True, type=Path)
    parser.add_argument("--settings", required=True, help="TuneSettings as JSON")
    parser.add_argument("--tenants", required=True, type=int)
    parser.add_argument("--threads", required=True, type=int)
    parser.add_argument("--packed", action="store_true")
    parser.add_argument("--mapped", action="store_true", help="share the emulator with other processes")
    options = parser.parse_args()
    use_threads(options.threads)
    settings = TuneSettings.model_validate_json(options.settings)
    artifact = mapped_artifact(options.artifact) if options.mapped else read_artifact(options.artifact)
    print(json.dumps(tune_tenants(artifact, settings, options.tenants, options.packed, _wait)))
    return 0


def _wait() -> None:
    print(READY, flush=True)
    sys.stdin.readline()


def _fail(name: str, error: Exception) -> None:
    raise RunFailed(f"Data owner {name}: {error}", "See its message.")


if __name__ == "__main__":
    sys.exit(main())
