"""What a benchmark's JSON says about how it was made: code, versions, date, machine."""

from __future__ import annotations

import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import scaleot_ray
from scaleot_ray.processors import usable_cores

PACKAGES = ("torch", "transformers", "peft", "ray")


def use_threads(wanted: int | None) -> int:
    """Makes torch compute with ``wanted`` threads, or with one per core; gives their number."""
    torch.set_num_threads(wanted or usable_cores())
    return torch.get_num_threads()


def environment() -> dict[str, Any]:
    """Code, versions, processor, cores and threads; equal for runs that may be compared in absolute numbers.

    Of use at the start of a run: the code that runs is the one that was loaded, whatever is edited meanwhile.
    """
    return {
        "scaleot_ray": scaleot_ray.__version__,
        **code_revision(Path(scaleot_ray.__file__).parents[1]),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "processor": _processor(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "matmul_precision": torch.get_float32_matmul_precision(),
    }


def code_revision(checkout: Path) -> dict[str, Any]:
    """``revision``: the commit that a git checkout is at; ``dirty``: whether its code has changes beside that.

    Code is what lies in ``scaleot_ray`` and the Python files in ``benchmarks``. Both are None where ``checkout`` is
    no git checkout of its own, or there is no git.
    """
    unknown = {"revision": None, "dirty": None}
    try:
        top, revision = _git(checkout, "rev-parse", "--show-toplevel", "HEAD")
        if Path(top).resolve() != checkout.resolve():
            return unknown  # an installed package that lies inside some other project
        changes = _git(
            checkout, "status", "--porcelain", "--untracked-files=all", "--", "scaleot_ray", "benchmarks/*.py"
        )
    except (OSError, subprocess.CalledProcessError):
        return unknown
    return {"revision": revision, "dirty": bool(changes)}


def _git(directory: Path, *arguments: str) -> list[str]:
    # Another git command may be at work in the checkout; looking must not get in its way.
    command = ["git", "--no-optional-locks", "-C", str(directory), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


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
