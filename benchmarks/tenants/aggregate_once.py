"""Deltas on disk become one, once, in a process of its own. Prints one JSON object."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from benchmarks.environment import use_threads
from benchmarks.overhead.process_memory import forget_peak, peak_bytes
from scaleot_ray.config import AggregationSettings
from scaleot_ray.plugin.aggregation import aggregate

_SAMPLE = 1000


def plain_mean(deltas: Sequence[Path]) -> dict[str, torch.Tensor]:
    """The mean as anyone would write it: each delta is loaded whole and added up in its own type, unchecked."""
    total: dict[str, torch.Tensor] = {}
    for delta in deltas:
        for path in sorted(delta.glob("*.safetensors")):
            for name, tensor in safetensors.torch.load_file(path).items():
                if name in total:
                    total[name].add_(tensor, alpha=1 / len(deltas))
                else:
                    total[name] = tensor / len(deltas)
    return total


def aggregate_once(deltas: Sequence[Path], settings: AggregationSettings | None) -> dict[str, Any]:
    """Makes one delta of many.

    Args:
        deltas: folders of artefacts; one may be there more than once.
        settings: how; None for :func:`plain_mean`.

    Returns:
        ``seconds``; ``peak_bytes``, resident while it works; ``added_bytes``, by how much that is more than before;
        ``peak_from_start`` if what was before could not be left out; ``sample``, values of the first tensor by name.
    """
    only_working, before = forget_peak(), peak_bytes()
    start = time.perf_counter()
    if settings is None:
        tensors = plain_mean(deltas)
    else:
        owners = [(f"data owner {number}", delta, 1.0) for number, delta in enumerate(deltas)]
        tensors = aggregate(owners, settings).delta.tensors
    seconds, peak = time.perf_counter() - start, peak_bytes()
    return {
        "seconds": seconds,
        "peak_bytes": peak,
        "added_bytes": peak - before,
        "peak_from_start": not only_working,
        "sample": tensors[min(tensors)].flatten()[:_SAMPLE].tolist(),
    }


def main() -> int:
    """Reads deltas from a folder that has them as 0, 1, 2, …"""
    parser = argparse.ArgumentParser("python -m benchmarks.tenants.aggregate_once", description=__doc__)
    parser.add_argument("--folder", required=True, type=Path)
    parser.add_argument("--distinct", required=True, type=int, help="so many are there, used in turn")
    parser.add_argument("--deltas", required=True, type=int)
    parser.add_argument("--threads", required=True, type=int)
    parser.add_argument("--settings", help="AggregationSettings as JSON; default: the plain mean")
    options = parser.parse_args()
    use_threads(options.threads)
    settings = AggregationSettings.model_validate_json(options.settings) if options.settings else None
    deltas = [options.folder / str(number % options.distinct) for number in range(options.deltas)]
    print(json.dumps(aggregate_once(deltas, settings)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
