"""What a benchmark's JSON says about how it was made: versions, date, machine."""

from __future__ import annotations

import platform
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from scaleot_ray import __version__
from scaleot_ray.processors import usable_cores

PACKAGES = ("torch", "transformers", "peft", "ray")


def use_threads(wanted: int | None) -> int:
    """Makes torch compute with ``wanted`` threads, or with one per core; gives their number."""
    torch.set_num_threads(wanted or usable_cores())
    return torch.get_num_threads()


def environment() -> dict[str, Any]:
    """Versions, processor, cores and threads; equal for runs that may be compared in absolute numbers."""
    return {
        "scaleot_ray": __version__,
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "processor": _processor(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "matmul_precision": torch.get_float32_matmul_precision(),
    }


def now() -> str:
    """ISO 8601 in UTC."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
