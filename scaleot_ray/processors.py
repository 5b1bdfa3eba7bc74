"""Processors this process may use, and that it computes with no more threads than that."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_QUOTA_V1 = (Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us"))


def usable_cores() -> int:
    """Cores this process may use: its affinity, and the container's quota where there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota()
    if len(quota) == 2 and quota[0].isdigit():  # no limit is "max", or −1 in version 1
        cores = min(cores, max(1, int(quota[0]) // int(quota[1])))
    return cores


def _quota() -> list[str]:
    """Processor time and period of the control group; nothing where there is none (not Linux, often)."""
    for files in ((_QUOTA,), _QUOTA_V1):
        try:
            return [word for file in files for word in file.read_text().split()]
        except OSError:
            continue
    return []


def use_usable_cores() -> None:
    """Makes torch compute with one thread per usable core, unless OMP_NUM_THREADS says how many.

    Left to itself torch starts a thread for every core of the host, whatever a container's quota says,
    and they then stand in one another's way. Actors do not need this: they get their threads from the
    processors that Ray gave them, and so do jobs of ``ray job submit --entrypoint-num-cpus``, since Ray
    sets OMP_NUM_THREADS for those.
    """
    if not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(usable_cores())


def thread_environment(cpus: int) -> dict[str, str]:
    """Environment that gives every library of a process ``cpus`` threads; it must be set before they start."""
    names = (
        "OMP_NUM_THREADS",
        "MKL_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "NUMEXPR_NUM_THREADS",
        "VECLIB_MAXIMUM_THREADS",
        "RAYON_NUM_THREADS",  # tokenizers
    )
    return {name: str(cpus) for name in names} | {"TOKENIZERS_PARALLELISM": "true" if cpus > 1 else "false"}
