"""Work in progress on disk: when it is written, and that what is read back is what was written."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

LONGEST_SECONDS = 60.0
"""Of work that an interruption may lose, as long as writing it down takes next to no time."""

_WRITING_SHARE = 0.05  # of the time at most; only a checkpoint of many seconds comes near it
_CHECKSUM = "sha256"


class CheckpointPace:
    """Says after which steps a checkpoint is due: every so many, and when a minute has passed.

    When something is written does not change what comes out, so the clock may have a say in it. Where
    writing takes long, the minute becomes twenty times as long as writing took.

    Args:
        every: steps between two checkpoints.
        clock: seconds.
    """

    def __init__(self, every: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._every, self._clock = every, clock
        self._last, self._cost = clock(), 0.0

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be written after ``step`` steps."""
        patience = max(LONGEST_SECONDS, self._cost / _WRITING_SHARE)
        return step % self._every == 0 or self._clock() - self._last >= patience

    def write(self, write: Callable[[], None]) -> None:
        """Writes a checkpoint; the minute begins again."""
        start = self._clock()
        write()
        self._last = self._clock()
        self._cost = self._last - start


def write_state(path: Path, tensors: dict[str, torch.Tensor], key: str, text: str) -> None:
    """Writes one safetensors file in place of the one at ``path``, which stays whole until this one is on the disk.

    Args:
        tensors: by name; on any device.
        key: name of the header's entry, which says what kind of file this is.
        text: the header's entry.

    Raises:
        OSError: it cannot be written; nothing half-written is left.
    """
    cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(cpu, temporary, metadata={key: text, _CHECKSUM: _checksum(cpu, text)})
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)  # else the machine's end may take back the new name
    except SafetensorError as error:
        raise as_os_error(error) from error
    finally:
        temporary.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Has a file, or the names in a folder, on the disk before it returns; raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_state(path: Path, key: str) -> tuple[dict[str, torch.Tensor], str]:
    """Tensors and text of a file that :func:`write_state` wrote under the same ``key``.

    Raises:
        SafetensorError, ValueError, KeyError: the file is damaged, or is something else.
        OSError: it cannot be read.
    """
    with safe_open(path, framework="pt") as file:
        header = dict(file.metadata() or {})
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    text = header.pop(key)
    if header.pop(_CHECKSUM) != _checksum(tensors, text) or header:
        raise ValueError("its bytes are not those that were written")
    return tensors, text


def read_header(path: Path, key: str) -> str:
    """The text alone, unchecked; raises what :func:`read_state` raises."""
    with safe_open(path, framework="pt") as file:
        return str((file.metadata() or {})[key])


def as_os_error(error: OSError | SafetensorError) -> OSError:
    """The system's error behind what writing a safetensors file raised, which says it as text alone."""
    if isinstance(error, OSError):
        return error
    code = re.search(r"os error (\d+)", str(error))
    return OSError(int(code.group(1)), str(error)) if code else OSError(str(error))


def _checksum(tensors: dict[str, torch.Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
