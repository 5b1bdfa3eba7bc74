"""One delta out of many on disk, by every way of aggregating, against a mean in plain PyTorch.

The deltas are random ones of a random model. Each measurement is in a process of its own, all ways in turn. Files are
read once before, so that they come from the page cache: what is measured is not the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.overhead.spread import ratios, spread
from benchmarks.tenants.options import add_small_model, whole_number
from benchmarks.tenants.subject import PLUG_IN_LAYERS, random_llama
from scaleot_ray.artifacts import Artifact, DeltaContent, write_artifact
from scaleot_ray.config import AggregationSettings, TuneSettings
from scaleot_ray.errors import RunFailed
from scaleot_ray.families import family_of
from scaleot_ray.tuning import METHODS

HELP = "a hundred deltas on disk become one"

PROJECT = Path(__file__).resolve().parents[2]
PLAIN = "plain mean"
WAYS: dict[str, tuple[str, ...]] = {
    "layers": (PLAIN, "mean", "median", "trimmed_mean"),
    "lora": (PLAIN, "mean", "concat", "svd"),
}
"""By how the deltas were tuned."""

_NOBODY = "0" * 64  # digest of the emulator that these deltas are not of
_GB, _MIB = 1e9, 2**20


def add_options(parser: argparse.ArgumentParser) -> None:
    """What may be chosen beside ``--output`` and ``--note``."""
    add_small_model(parser)
    parser.add_argument("--lora-rank", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--deltas", type=int, default=100, help="that become one; default: %(default)s")
    parser.add_argument("--distinct", type=int, default=8, help="of them on disk, used in turn; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of all ways; default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="default: one, as the coordinator has")


def measure(options: argparse.Namespace, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Writes the deltas to ``folder``, and measures; gives what goes into the JSON."""
    deltas = whole_number(options, "deltas", 3, "a trimmed mean leaves some out")
    distinct = min(whole_number(options, "distinct", 1, "a delta is needed"), deltas)
    rank = whole_number(options, "lora_rank", 1, "a low-rank delta has at least that rank")
    repeats = whole_number(options, "repeats", 1, "each way is measured")
    found, model = {}, random_llama(options.hidden, options.layers)
    for method in WAYS:
        say(f"writing {distinct} deltas of {method}")
        size = write_deltas(folder / method, model, TuneSettings(method=method, lora_rank=rank), distinct)
        found[method] = _compare(folder / method, method, deltas, distinct, size, repeats, options.threads, say)
    return {
        "settings": {
            **{key: getattr(options, key) for key in ("hidden", "layers", "lora_rank")},
            "deltas": deltas,
            "distinct": distinct,
        },
        "page_cache": "warm: every file was read once before the first measurement",
        "aggregation": found,
    }


def write_deltas(folder: Path, model: Any, tune: TuneSettings, count: int) -> int:
    """Writes ``count`` random deltas as the artefacts ``0``, ``1``, …; gives the bytes of one's tensors."""
    family, method = family_of(model.config), METHODS[tune.method]
    ends = PLUG_IN_LAYERS // 2
    last = model.config.num_hidden_layers
    positions = (*range(ends), *range(last - ends, last))
    settings = method.settings(tune, family)
    shapes = method.shapes(model, family, positions, settings)
    content = DeltaContent(method=tune.method, positions=list(positions), settings=dict(settings), start=None)
    generator, size = torch.Generator().manual_seed(0), 0
    for number in range(count):
        tensors = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        artifact = Artifact.create("delta", content, tensors, parent_digest=_NOBODY)
        size = artifact.nbytes
        write_artifact(artifact, folder / str(number))
    return size


def _compare(
    folder: Path,
    method: str,
    deltas: int,
    distinct: int,
    size: int,
    repeats: int,
    threads: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Measures all ways in turn, ``repeats`` times.

    Returns:
        ``delta_bytes``; ``ways``, each with ``seconds``, ``gb_per_second`` (read, 10^9 bytes), ``peak_bytes`` and
        ``added_bytes`` (see :func:`~benchmarks.tenants.aggregate_once.aggregate_once`); ``ratios`` of speed and of peak
        memory, each way ÷ the plain mean; ``difference`` of the mean from the plain one, relative to the largest
        value: near zero, they did the same.

    Raises:
        RunFailed: a process ended with an error.
    """
    for path in sorted(folder.rglob("*.safetensors")):
        path.read_bytes()
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS[method]}
    for repeat in range(repeats):
        for way, results in found.items():
            results.append(_run(folder, way, deltas, distinct, threads))
            speed, added = deltas * size / results[-1]["seconds"], results[-1]["added_bytes"]
            say(
                f"aggregation, {method}, round {repeat + 1} of {repeats}: {way}: {speed / _GB:.2f} GB/s, "
                f"{added / _MIB:.0f} MiB"
            )
    values = {
        way: {
            "gb_per_second": [deltas * size / one["seconds"] / _GB for one in results],
            **{key: [one[key] for one in results] for key in ("seconds", "peak_bytes", "added_bytes")},
        }
        for way, results in found.items()
    }
    plain = values[PLAIN]
    return {
        "delta_bytes": size,
        "ways": {
            way: {
                **{key: spread(every) for key, every in own.items()},
                "peak_from_start": any(one["peak_from_start"] for one in found[way]),
            }
            for way, own in values.items()
        },
        "ratios": {
            f"{way} / {PLAIN}": {
                "speed": ratios(own["gb_per_second"], plain["gb_per_second"]),
                "memory": ratios(own["peak_bytes"], plain["peak_bytes"]),
            }
            for way, own in values.items()
            if way != PLAIN
        },
        "difference": difference(found["mean"][0]["sample"], found[PLAIN][0]["sample"]),
    }


def difference(one: list[float], other: list[float]) -> float:
    """Largest difference between two lists of values ÷ the second one's largest value."""
    largest = max(abs(value) for value in other)
    return max(abs(value - beside) for value, beside in zip(one, other, strict=True)) / largest


def _run(folder: Path, way: str, deltas: int, distinct: int, threads: int) -> dict[str, Any]:
    command = [
        *(sys.executable, "-m", "benchmarks.tenants.aggregate_once", "--folder", str(folder.resolve())),
        *("--deltas", str(deltas), "--distinct", str(distinct), "--threads", str(threads)),
    ]
    if way != PLAIN:
        # Of fewer than ten deltas the default share would leave none out.
        settings = AggregationSettings(method=way, trim=max(0.1, 1 / deltas))
        command += ["--settings", settings.model_dump_json()]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunFailed(f"A process that measured {way} ended with {done.returncode}: {last}", "See its message.")
    result = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(result, dict)
    return result


def lines(document: Mapping[str, Any]) -> list[str]:
    """The table that is printed."""
    rows = ["| deltas | way | GB/s | peak memory, MiB | speed ÷ plain mean | memory ÷ |", "|---|---|---|---|---|---|"]
    for method, found in document["aggregation"].items():
        for way, own in found["ways"].items():
            ratio = found["ratios"].get(f"{way} / {PLAIN}")
            speed, peak = own["gb_per_second"]["median"], own["peak_bytes"]["median"] / _MIB
            shares = [f"{ratio[key]['median']:.3f}" if ratio else "" for key in ("speed", "memory")]
            rows.append(f"| {method} | {way} | {speed:.3f} | {peak:.0f} | {' | '.join(shares)} |")
    return rows
