"""One way of tuning, in a process of its own, for its speed and its peak memory. Prints one JSON object."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from benchmarks.environment import use_threads
from benchmarks.overhead.bare_loop import bare_loop
from benchmarks.overhead.process_memory import forget_peak, peak_bytes
from benchmarks.overhead.subjects import random_batches
from scaleot_ray.artifacts import Artifact, read_artifact
from scaleot_ray.config import TuneSettings
from scaleot_ray.emulator.assemble import assemble, emulator_content
from scaleot_ray.families import family_of
from scaleot_ray.stages.limits import vocabulary_size
from scaleot_ray.tuning import tune
from scaleot_ray.tuning.lora import LowRank

MODES = ("emulator_layers", "emulator_lora", "full_lora", "full_fine_tuning")
"""The data owner's tuning of whole plug-in layers, and by LoRA in them; LoRA in all layers of the full model, and
all parameters of it, both in a bare loop."""

FINE_TUNING_RATE = 2e-5


def train_once(artifact: Artifact, mode: str, settings: TuneSettings) -> dict[str, Any]:
    """Trains ``settings.steps`` steps on random tokens.

    Args:
        artifact: an emulator, or the full model (see :func:`~benchmarks.overhead.subjects.whole_model`).
        mode: one of ``MODES``.
        settings: batch, block size, steps (at least two: the first is not timed), LoRA rank.

    Returns:
        ``tokens_per_second`` from the second step on, ``peak_bytes`` of the process while training (what it
        holds before included), ``peak_from_start`` if loading could not be left out, ``trained_parameters``.
    """
    model = assemble(artifact)
    family = family_of(model.config)
    batches = random_batches(vocabulary_size(model), settings.batch_size, settings.block_size)
    marks: list[float] = []

    def mark(_: object) -> None:
        marks.append(time.perf_counter())

    only_training = forget_peak()
    if mode.startswith("emulator"):
        own = settings.model_copy(update={"method": mode.removeprefix("emulator_")})
        positions = emulator_content(artifact.manifest).plug_in_positions
        delta = tune(model, family, positions, batches, own, on_progress=mark).delta
        trained = sum(tensor.numel() for tensor in delta.tensors.values())
    else:
        rate = FINE_TUNING_RATE
        if mode == "full_lora":
            chosen, rate = LowRank.settings(settings, family), LowRank.learning_rate
            lora = LoraConfig(
                r=settings.lora_rank,
                lora_alpha=settings.lora_alpha,
                target_modules=chosen["targets"],
                lora_dropout=0.0,
                fan_in_fan_out=family.transposed,
                task_type="CAUSAL_LM",
            )
            model = get_peft_model(model, lora)
            parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        else:
            parameters = list(model.parameters())
        trained = sum(parameter.numel() for parameter in parameters)
        bare_loop(model, parameters, batches.batches(), settings, rate, mark)
    tokens = (settings.steps - 1) * settings.batch_size * settings.block_size
    return {
        "tokens_per_second": tokens / (marks[-1] - marks[0]),
        "peak_bytes": peak_bytes(),
        "peak_from_start": not only_training,
        "trained_parameters": trained,
    }


def main() -> int:
    """Runs one mode on an artefact on disk."""
    parser = argparse.ArgumentParser("python -m benchmarks.overhead.train_once", description=__doc__)
    parser.add_argument("--artifact", required=True, type=Path)
    parser.add_argument("--mode", required=True, choices=MODES)
    parser.add_argument("--settings", required=True, help="TuneSettings as JSON")
    parser.add_argument("--threads", required=True, type=int)
    options = parser.parse_args()
    use_threads(options.threads)
    settings = TuneSettings.model_validate_json(options.settings)
    torch.manual_seed(settings.seed)
    print(json.dumps(train_once(read_artifact(options.artifact), options.mode, settings)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
