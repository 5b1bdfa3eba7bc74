"""What ``scaleot doctor`` looks at. Each check finds a fact, judges it and knows the remedy."""

from __future__ import annotations

import json
import os
import platform
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

GIB = 2**30
RAY_SECONDS = 120  # a Ray that has not started by then will not
MARK = "SCALEOT_DOCTOR"  # in the environment of every process of the doctor's Ray


@dataclass(frozen=True)
class Check:
    """One line of the doctor's report.

    Attributes:
        name: what was looked at.
        status: ``ok``; ``warn``: it works, but slowly or not for everything; ``fail``: runs will fail.
        found: the fact.
        remedy: what to do about it; empty when it is ok.
    """

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    remedy: str = ""

    def as_json(self) -> dict[str, Any]:
        """The check as plain values."""
        return asdict(self)


def all_checks() -> Iterator[Check]:
    """Every check, the quick ones first; without the packages the others cannot be made."""
    yield python_version(sys.version_info[:3])
    installed = packages()
    yield installed
    if installed.status == "fail":
        return

    from scaleot_ray.resources.machine import this_machine

    machine = this_machine()
    yield threads(machine.cpus, os.environ.get("OMP_NUM_THREADS"))
    yield memory(machine.memory)
    yield disk(Path.cwd())
    yield shared_memory(machine.shared_memory)
    yield gpu()
    yield from ray_checks()


def python_version(version: tuple[int, ...]) -> Check:
    """Python is 3.10 or newer."""
    found = f"{'.'.join(map(str, version))} on {platform.system()} {platform.machine()}"
    if version < (3, 10):
        return Check("python", "fail", found, "Install Python 3.10 or newer.")
    return Check("python", "ok", found)


def packages() -> Check:
    """Every package we depend on is installed in a version we work with."""
    from packaging.requirements import Requirement

    wrong, found = [], []
    for text in metadata.requires("scaleot_ray") or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} is {version}, needed {requirement.specifier}")
        elif requirement.name in ("torch", "transformers", "ray"):
            found.append(f"{requirement.name} {version}")
    if wrong:
        return Check(
            "packages", "fail", "; ".join(wrong), "Install again, in the folder of the project: pip install --upgrade ."
        )
    return Check("packages", "ok", ", ".join(found))


def threads(cores: int, omp_threads: str | None) -> Check:
    """No process computes with more threads than there are cores."""
    if omp_threads is None:
        return Check("threads", "ok", f"{cores} cores; each actor uses the cores it was given")
    found = f"{cores} cores, OMP_NUM_THREADS={omp_threads}"
    if not omp_threads.isdigit() or int(omp_threads) < 1:
        return Check("threads", "warn", found, "Unset OMP_NUM_THREADS, or set it to a whole number of cores.")
    if int(omp_threads) > cores:
        remedy = "Unset OMP_NUM_THREADS: more threads than cores are many times slower."
        return Check("threads", "warn", found, remedy)
    if int(omp_threads) < cores:
        remedy = "Unset OMP_NUM_THREADS so that build, tune and eval use all cores."
        return Check("threads", "warn", found, remedy)
    return Check("threads", "ok", found)


def memory(free: int) -> Check:
    """The demo fits in memory."""
    found = f"{free / GIB:.1f} GiB free"
    if free < 3 * GIB:
        remedy = "The demo needs about 8 GiB and tiny models about 3 GiB: close programs, or take a larger machine."
        return Check("memory", "fail", found, remedy)
    if free < 10 * GIB:
        return Check("memory", "warn", found, "The demo may use up to 10 GB: close other programs while it runs.")
    return Check("memory", "ok", found)


def disk(folder: Path) -> Check:
    """Artefacts, checkpoints and Ray's session files fit on disk."""
    places = {str(folder): folder, tempfile.gettempdir(): Path(tempfile.gettempdir())}
    free = {name: shutil.disk_usage(path).free for name, path in places.items()}
    found = ", ".join(f"{count / GIB:.1f} GiB free in {name}" for name, count in free.items())
    tightest = min(free, key=lambda name: free[name])
    if free[tightest] < GIB:
        return Check("disk", "fail", found, f"Free some space in {tightest}; 1 GiB is the least, the demo writes 2.")
    if free[tightest] < 5 * GIB:
        return Check("disk", "warn", found, f"Free some space in {tightest}; larger models write several copies.")
    return Check("disk", "ok", found)


def shared_memory(free: int | None) -> Check:
    """The object store can live in shared memory."""
    if free is None:
        return Check("shared memory", "ok", "no /dev/shm on this system; Ray uses the temporary folder")
    found = f"{free / GIB:.1f} GiB free in /dev/shm"
    if free < 2 * GIB:
        remedy = "Ray uses slower disk files then. In a container: docker run --shm-size=4g, or an emptyDir in memory."
        return Check("shared memory", "warn", found, remedy)
    return Check("shared memory", "ok", found)


def gpu() -> Check:
    """Torch sees the GPUs there are."""
    import torch

    if torch.cuda.is_available():
        names = []
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            names.append(f"{properties.name} {properties.total_memory / GIB:.0f} GiB")
        return Check("gpu", "ok", ", ".join(names))
    if shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
        if listed.returncode == 0 and listed.stdout.strip():
            found = f"{listed.stdout.strip().splitlines()[0]}, which torch {torch.__version__} cannot use"
            return Check(
                "gpu", "warn", found, "Install a torch build for this driver: https://pytorch.org/get-started."
            )
    return Check("gpu", "ok", "none; everything runs on the CPU")


def ray_checks() -> Iterator[Check]:
    """Ray starts, and its object store hands out arrays without copying them."""
    from scaleot_ray.resources.machine import session_folder
    from scaleot_ray.resources.processes import end_marked

    try:
        folder = session_folder()
    except OSError as error:
        yield Check("ray", "fail", f"no folder for its session files: {error}", _RAY_REMEDY)
        return
    mark = secrets.token_hex(8)
    command = [sys.executable, "-m", "scaleot_ray.cli.ray_probe", str(folder)]
    try:
        probe = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=RAY_SECONDS,
            check=False,
            env={**os.environ, MARK: mark},
        )
    except subprocess.TimeoutExpired:
        yield Check("ray", "fail", f"did not start within {RAY_SECONDS} s", _RAY_REMEDY)
        return
    finally:
        # Ray's processes outlive a probe that had to be killed; all of them inherit the mark.
        end_marked(MARK, mark)
        shutil.rmtree(folder, ignore_errors=True)
    if probe.returncode != 0:
        lines = [line for line in probe.stderr.splitlines() if line.strip()] or ["no message"]
        yield Check("ray", "fail", f"does not start: {lines[-1][:200]}", _RAY_REMEDY)
        return
    found = json.loads(probe.stdout.splitlines()[-1])
    yield Check("ray", "ok", f"started and answered in {found['seconds']:.1f} s")
    if found["zero_copy"]:
        yield Check("object store", "ok", "readers share one copy")
    else:
        remedy = "Every reader gets its own copy of the emulator: count its size once per data owner, or upgrade ray."
        yield Check("object store", "warn", "readers copy", remedy)


_RAY_REMEDY = (
    "Stop Rays that were left running (ray stop), check that localhost resolves and the temporary folder is "
    "writable and not full."
)
