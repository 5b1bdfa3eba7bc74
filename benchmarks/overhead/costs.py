"""Speed and memory of tuning an emulator against LoRA and full fine-tuning of the full model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.overhead.spread import ratios, spread
from benchmarks.overhead.train_once import MODES
from scaleot_ray.config import TuneSettings
from scaleot_ray.errors import RunFailed

PROJECT = Path(__file__).resolve().parents[2]


def compare_costs(
    emulator: Path,
    full: Path,
    settings: TuneSettings,
    repeats: int,
    threads: int,
    say: Callable[[str], None],
    modes: Sequence[str] = MODES,
) -> dict[str, Any]:
    """Runs every mode in a process of its own, all modes in turn, ``repeats`` times.

    Args:
        emulator: artefact on disk.
        full: the full model as an artefact on disk.
        settings: steps (the first is not timed), batch, block size.
        repeats: rounds.
        threads: of each process.
        say: hears of each measurement.
        modes: some of ``MODES``.

    Returns:
        By mode: ``tokens_per_second``, ``peak_bytes``, ``trained_parameters``; and by pair of an emulator
        mode and a mode of the full model ``ratios``: ``speed`` and ``memory``, round by round.

    Raises:
        RunFailed: a process ended with an error.
    """
    found: dict[str, list[dict[str, Any]]] = {mode: [] for mode in modes}
    for number in range(repeats):
        for mode in modes:
            artifact = emulator if mode.startswith("emulator") else full
            result = _measure(artifact, mode, settings, threads)
            found[mode].append(result)
            say(
                f"costs, round {number + 1} of {repeats}: {mode}: {result['tokens_per_second']:,.0f} tokens/s, "
                f"{result['peak_bytes'] / 2**30:.2f} GiB"
            )
    values = {mode: _by_key(results) for mode, results in found.items()}
    return {
        "steps": settings.steps,
        "modes": {
            mode: {
                "tokens_per_second": spread(own["tokens_per_second"]),
                "peak_bytes": spread(own["peak_bytes"]),
                "peak_from_start": any(own["peak_from_start"]),
                "trained_parameters": own["trained_parameters"][0],
            }
            for mode, own in values.items()
        },
        "ratios": {
            f"{mode} / {other}": {
                "speed": ratios(values[mode]["tokens_per_second"], values[other]["tokens_per_second"]),
                "memory": ratios(values[mode]["peak_bytes"], values[other]["peak_bytes"]),
            }
            for mode in modes
            for other in modes
            if mode.startswith("emulator") and other.startswith("full")
        },
    }


def _measure(artifact: Path, mode: str, settings: TuneSettings, threads: int) -> dict[str, Any]:
    done = subprocess.run(
        [
            sys.executable,
            *("-m", "benchmarks.overhead.train_once"),
            *("--artifact", str(artifact.resolve()), "--mode", mode),
            *("--settings", settings.model_dump_json(), "--threads", str(threads)),
        ],
        cwd=PROJECT,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunFailed(f"{mode}: the measuring process ended with {done.returncode}: {last}", "See its message.")
    result = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(result, dict)
    return result


def _by_key(results: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    return {key: [result[key] for result in results] for key in results[0]}
