"""A tuning run on disk: one safetensors file, replaced as a whole, from which it carries on bit for bit."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from scaleot_ray.checkpoints import read_state, write_state
from scaleot_ray.data.batches import Batch
from scaleot_ray.errors import NO_ROOM, ConfigError, ResourcesMissing, RunFailed

FORMAT = 1
_HEADER = "tuning"
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class Checkpoint:
    """State of a run after a whole number of optimizer steps.

    Attributes:
        run: what the run is of (settings, model, positions); a run with another one does not resume from it.
        record: JSON-able rest: step, history, digest of the last batch, best evaluation, loss scale.
        tensors: trained values, optimizer state, random generators, best values, by prefixed names.
    """

    run: dict[str, Any]
    record: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    def part(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors whose names begin with ``prefix``, without it."""
        return {name.removeprefix(prefix): tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}

    def write(self, path: Path) -> None:
        """Writes the checkpoint in place of the one at ``path``, which stays whole until this one is.

        Raises:
            ResourcesMissing: the disk is full; the older checkpoint is still there.
            RunFailed: the file cannot be written for another reason.
        """
        text = json.dumps({"format": FORMAT, "run": self.run, "record": self.record})
        try:
            write_state(path, self.tensors, _HEADER, text)
        except OSError as error:
            if error.errno in NO_ROOM:
                raise ResourcesMissing(
                    f"{path}: no room to write a checkpoint ({error}).",
                    "Free disk space and run again; it carries on from the checkpoint before.",
                ) from error
            raise RunFailed(
                f"{path}: the checkpoint could not be written ({error}).", "Give a folder that can be written."
            ) from error


def prepare_place(path: Path) -> None:
    """Makes the folder of a checkpoint, so that a wrong one shows before the first step.

    Raises:
        ConfigError: no file can be written at ``path``.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, "is a folder, or its folder may not be written")
    except OSError as error:
        raise ConfigError(
            f"{path}: a checkpoint cannot be written there ({error.strerror}).", "Give a file in a folder of your own."
        ) from error


def read_checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint at ``path``, or None where there is none.

    Raises:
        RunFailed: the file is no checkpoint of a tuning run, or is damaged.
    """
    if not path.exists():
        return None
    try:
        tensors, text = read_state(path, _HEADER)
        header = json.loads(text)
        if header["format"] != FORMAT:
            raise ValueError(f"format {header['format']}, expected {FORMAT}")
        return Checkpoint(header["run"], header["record"], tensors)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise RunFailed(
            f"{path}: is no readable checkpoint of a tuning run ({error}).", "Delete it; tuning then starts afresh."
        ) from error


def resumable(path: Path, run: Mapping[str, Any], resume: bool) -> Checkpoint | None:
    """The checkpoint that a run goes on from, or None where it begins; the place for it is there then.

    Args:
        path: of the checkpoint.
        run: what the run is of.
        resume: False begins in any case.

    Raises:
        ConfigError: no file can be written at ``path``, or the one there is of another run.
        RunFailed: the file there is damaged.
    """
    prepare_place(path)
    saved = read_checkpoint(path) if resume else None
    if saved is not None:
        check_same_run(saved.run, run, path)
    return saved


def check_same_run(found: Mapping[str, Any], expected: Mapping[str, Any], path: Path) -> None:
    """Refuses a checkpoint of another run.

    Raises:
        ConfigError: names the first setting that differs, with both values.
    """
    expected = json.loads(json.dumps(expected))
    for key in sorted(expected.keys() | found.keys()):
        if found.get(key) != expected.get(key):
            raise ConfigError(
                f"{path}: the checkpoint is of another run: {key} was {found.get(key)!r}, is {expected.get(key)!r}.",
                "Go on with what it was started with, or delete the checkpoint to start afresh.",
            )


def model_fingerprint(model: nn.Module) -> str:
    """:func:`tensors_fingerprint` of all parameters."""
    return tensors_fingerprint(dict(model.named_parameters()))


def tensors_fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """A cheap digest of tensors (hex), to tell them apart by mistake, not by intent.

    Sums of the bits as integers do not depend on the order of summation, so it is the same on any
    number of threads and on any device.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        bits = tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()])
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {int(bits.sum())}\n".encode())
    return digest.hexdigest()


def batch_fingerprint(batch: Batch) -> str:
    """SHA-256 (hex) of a batch's tokens and labels."""
    digest = hashlib.sha256()
    for name in ("input_ids", "labels"):
        digest.update(f"{tuple(batch[name].shape)}".encode())
        digest.update(batch[name].cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
