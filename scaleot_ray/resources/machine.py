"""What this machine has for a run: cores, memory, shared memory, GPUs; container limits included."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from scaleot_ray.processors import usable_cores

_SHARED_MEMORY = Path("/dev/shm")
_CONTROL_GROUP = Path("/sys/fs/cgroup")
# Of version 2 and of version 1: the limit, what is used, and which of that the kernel can take back (the files' pages).
_LIMITS = (
    ("memory.max", "memory.current", "memory.stat", ("active_file", "inactive_file")),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        ("total_active_file", "total_inactive_file"),
    ),
)
_SOCKET_PATH_LIMIT = 40  # Ray appends about 65 characters; unix sockets take 107


@dataclass(frozen=True)
class Machine:
    """What is free now.

    Attributes:
        cpus: cores this process may use.
        gpus: GPUs torch sees.
        memory: bytes of free memory.
        shared_memory: bytes free for the object store; None where the system has no /dev/shm and Ray
            uses the temporary folder.
        cpus_held, gpus_held: what others hold beside that, on a Ray that was given.
    """

    cpus: int
    gpus: float
    memory: int
    shared_memory: int | None
    cpus_held: float = 0
    gpus_held: float = 0


def this_machine() -> Machine:
    """The machine we run on."""
    shared = shutil.disk_usage(_SHARED_MEMORY).free if _SHARED_MEMORY.is_dir() else None
    return Machine(usable_cores(), torch.cuda.device_count(), usable_memory(), shared)


def usable_memory() -> int:
    """Bytes of memory that are free for us, in this container.

    What holds pages of files that were read or written counts as free: the kernel takes it back when it is needed.
    """
    free = int(psutil.virtual_memory().available)
    for limit, used, statistics, of_files in _LIMITS:
        most = _text(_CONTROL_GROUP / limit)
        if most.isdigit():
            counts = dict(line.split() for line in _text(_CONTROL_GROUP / statistics).splitlines())
            reclaimable = sum(int(counts.get(key, 0)) for key in of_files)
            free = min(free, int(most) - int(_text(_CONTROL_GROUP / used) or 0) + reclaimable)
    return max(free, 0)


def session_folder() -> Path:
    """A new folder for the session files of a Ray of our own; who asks for it removes it.

    It lies in the temporary folder, or where that has too long a name for Ray's sockets in /tmp.
    """
    short = len(tempfile.gettempdir()) <= _SOCKET_PATH_LIMIT - len("/scaleot-12345678")
    return Path(tempfile.mkdtemp(prefix="scaleot-", dir=None if short else "/tmp"))


def free_disk(folder: Path) -> int:
    """Bytes free where ``folder`` is or will be."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""  # not Linux, or no control groups: then there is no such limit
