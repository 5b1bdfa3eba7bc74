"""Memory and time of n data owners' LoRA tuning: in one pass, one after the other, in processes of their own."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.overhead.spread import ratios, spread
from benchmarks.overhead.subjects import triplet, untrained_emulator
from benchmarks.tenants.options import tenant_numbers, whole_number
from benchmarks.tenants.tune_tenants import READY
from scaleot_ray.artifacts import write_artifact
from scaleot_ray.config import EmulatorSettings, ModelSettings, TuneSettings
from scaleot_ray.emulator.assemble import emulator_content
from scaleot_ray.errors import RunFailed
from scaleot_ray.families.loading import load_base_model

HELP = "LoRA tuning of 1 to 8 data owners, by how they are put into processes"

PROJECT = Path(__file__).resolve().parents[2]
_PAUSE = 0.1  # seconds between two looks at the processes' memory


@dataclass(frozen=True)
class Way:
    """How n data owners are put into processes."""

    one_process: bool
    options: tuple[str, ...] = ()


WAYS = {
    "packed": Way(True, ("--packed",)),
    "in_turn": Way(True),
    "separate": Way(False),
    "separate_mapped": Way(False, ("--mapped",)),
}
"""One pass for the rows of all; one after the other in one process; n processes at once, each with the emulator in
memory of its own, and with the emulator in memory that all map."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """What may be chosen beside ``--output`` and ``--note``."""
    parser.add_argument("--model", required=True, help="Hugging Face directory or .gguf file")
    parser.add_argument("--settings", default="4,0.5,0.8", help="the emulator's N_a,alpha,beta; default: %(default)s")
    parser.add_argument("--tenants", default="1,2,4,8", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of each data owner")
    parser.add_argument("--repeats", type=int, default=1, help="rounds of all ways")
    parser.add_argument("--batch-size", type=int, default=1, help="of each data owner")
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--threads", type=int, help="default: all cores")


def measure(options: argparse.Namespace, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Builds the emulator in ``folder``, and measures; gives what goes into the JSON."""
    tenants, settings = tenant_numbers(options), triplet(options.settings)
    steps = whole_number(options, "steps", 2, "the first step is not timed")
    tune = TuneSettings(method="lora", steps=steps, batch_size=options.batch_size, block_size=options.block_size)
    say("building the emulator")
    return {
        "model": Path(options.model).name,
        "settings": {
            "triplet": options.settings,
            **{key: getattr(tune, key) for key in ("batch_size", "block_size", "steps", "lora_rank")},
        },
        "emulator": _emulator(options.model, settings, tune.block_size, folder),
        "packing": compare_packing(folder, tune, tenants, options.repeats, torch.get_num_threads(), say),
    }


def compare_packing(
    emulator: Path,
    settings: TuneSettings,
    tenants: Sequence[int],
    repeats: int,
    threads: int,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Measures every way for every number of data owners, all ways in turn, ``repeats`` times.

    Args:
        emulator: artefact on disk.
        settings: steps (the first is not timed), batch, block size, rank.
        tenants: numbers of data owners.
        repeats: rounds.
        threads: of all processes together; each has at least one.
        say: hears of each measurement.

    Returns:
        For each number ``tenants``: ``ways`` with ``peak_pss`` (bytes, the largest sum over the processes, of what
        they share each its part), ``peak_rss`` (sum of each process's own peak), ``tenant_step_seconds``; ``ratios``
        packed ÷ each other way of memory (``peak_pss``) and seconds; and ``loss_difference``, the largest relative
        one between packed and in turn, which shows that they did the same work.

    Raises:
        RunFailed: a process ended with an error.
    """
    return [_compare(emulator, settings, number, repeats, threads, say) for number in tenants]


def _emulator(model: str, settings: EmulatorSettings, block_size: int, folder: Path) -> dict[str, Any]:
    """Writes the emulator; its process lets the model go, so that those measured have the memory."""
    base = load_base_model(ModelSettings(path=model, dtype="float32", device="cpu"))
    emulator = untrained_emulator(base, settings, block_size)
    write_artifact(emulator, folder, overwrite=True)
    content = emulator_content(emulator.manifest)
    return {"bytes": emulator.nbytes, "full_bytes": content.full_bytes, "layer_map": content.layer_map}


def _compare(
    emulator: Path, settings: TuneSettings, tenants: int, repeats: int, threads: int, say: Callable[[str], None]
) -> dict[str, Any]:
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in WAYS}
    for number in range(repeats):
        for name, way in WAYS.items():
            result = _measure(emulator, way, settings, tenants, threads)
            found[name].append(result)
            say(
                f"packing, {tenants} data owners, round {number + 1} of {repeats}: {name}: "
                f"{result['peak_pss'] / 2**30:.2f} GiB, {result['tenant_step_seconds']:.2f} s per step of one"
            )
    keys = ("peak_pss", "peak_rss", "tenant_step_seconds")
    values = {name: {key: [result[key] for result in results] for key in keys} for name, results in found.items()}
    losses = zip(found["packed"][0]["losses"], found["in_turn"][0]["losses"], strict=True)
    return {
        "tenants": tenants,
        "ways": {
            name: {
                **{key: spread(own) for key, own in values[name].items()},
                "peak_from_start": any(result["peak_from_start"] for result in results),
            }
            for name, results in found.items()
        },
        "ratios": {
            f"packed / {name}": {
                "memory": ratios(values["packed"]["peak_pss"], own["peak_pss"]),
                "seconds": ratios(values["packed"]["tenant_step_seconds"], own["tenant_step_seconds"]),
            }
            for name, own in values.items()
            if name != "packed"
        },
        "loss_difference": max(abs(one / other - 1) for one, other in losses),
    }


def _measure(emulator: Path, way: Way, settings: TuneSettings, tenants: int, threads: int) -> dict[str, Any]:
    count, each = (1, tenants) if way.one_process else (tenants, 1)
    processes = [_start(emulator, way, settings, each, max(1, threads // count)) for _ in range(count)]
    try:
        for process in processes:
            assert process.stdout is not None
            if process.stdout.readline().strip() != READY:
                _fail(process)
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        peak_pss = 0
        while any(process.poll() is None for process in processes):
            peak_pss = max(peak_pss, sum(_pss(process.pid) for process in processes))
            time.sleep(_PAUSE)
        results = [_result(process) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return {
        "peak_pss": peak_pss,
        "peak_rss": sum(result["peak_rss"] for result in results),
        # Processes run side by side: the slowest one's time is the time of all.
        "tenant_step_seconds": max(result["seconds"] for result in results) / tenants / (settings.steps - 1),
        "peak_from_start": any(result["peak_from_start"] for result in results),
        "losses": [loss for result in results for loss in result["losses"]],
    }


def _start(emulator: Path, way: Way, settings: TuneSettings, tenants: int, threads: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            sys.executable,
            *("-m", "benchmarks.tenants.tune_tenants"),
            *("--artifact", str(emulator.resolve()), "--settings", settings.model_dump_json()),
            *("--tenants", str(tenants), "--threads", str(threads), *way.options),
        ],
        cwd=PROJECT,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


def _pss(pid: int) -> int:
    try:
        return int(psutil.Process(pid).memory_full_info().pss)
    except psutil.Error:
        return 0  # it has just ended


def _result(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    lines = process.stdout.read().splitlines()
    if process.wait() or not lines:
        _fail(process)
    result = json.loads(lines[-1])
    assert isinstance(result, dict)
    return result


def _fail(process: subprocess.Popen[str]) -> None:
    process.kill()
    assert process.stderr is not None
    last = (process.stderr.read().strip().splitlines() or ["no message"])[-1]
    raise RunFailed(f"A measuring process ended with {process.wait()}: {last}", "See its message.")


def lines(document: Mapping[str, Any]) -> list[str]:
    """The table that is printed."""
    rows = ["| data owners | packed ÷ | memory | seconds per step of one |", "|---|---|---|---|"]
    for found in document["packing"]:
        for pair, ratio in found["ratios"].items():
            memory, seconds = ratio["memory"]["median"], ratio["seconds"]["median"]
            rows.append(f"| {found['tenants']} | {pair.partition(' / ')[2]} | {memory:.3f} | {seconds:.3f} |")
    return rows
