"""What a stage's result depends on, as one digest: equal digests mean that the result can be reused."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scaleot_ray.config import DataSettings, Settings
from scaleot_ray.data.batches import Batch
from scaleot_ray.data.dataset_key import dataset_key
from scaleot_ray.data.sources import find_sources

KEY_FILE = "data.key"

_BLOCK, _KEY_BYTES = 1 << 20, 32
_SAMPLE = 64  # values from either end of a parameter


def identity(**parts: Any) -> str:
    """SHA-256 (hex) over named parts: sections of settings, and plain values that JSON takes."""
    plain = {name: part.model_dump(mode="json") if isinstance(part, Settings) else part for name, part in parts.items()}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, allow_nan=False).encode()).hexdigest()


def data_digest(settings: DataSettings, key: str) -> str:
    """SHA-256 (hex) over a dataset's bytes and how its rows are read; where it lies does not count.

    The digest of private data is private too: it stays in files of the data's owner.

    Args:
        settings: the dataset.
        key: which of a command's datasets it is, for messages.

    Raises:
        DataError: the dataset is missing or of no known format.
    """
    digest = hashlib.sha256(identity(settings=settings.model_dump(mode="json", exclude={"path"})).encode())
    with dataset_key(key):
        sources = find_sources(settings)
    for source in sources:
        files = sorted(source.path.rglob("*")) if source.path.is_dir() else [source.path]
        for path in files:
            if path.is_file():
                digest.update(f"{source.format} {path.stat().st_size}\n".encode())
                _add(digest, path)
    return digest.hexdigest()


def keyed_digest(settings: DataSettings, folder: Path) -> str:
    """HMAC-SHA-256 (hex) of a dataset's digest, which may leave its owner: without the key it says nothing.

    Equal ones show that two deltas came of the same rows. The key is made at first use and stays in ``folder``.

    Raises:
        DataError: as :func:`data_digest`.
    """
    return hmac.new(_key(folder / KEY_FILE), data_digest(settings, "train").encode(), hashlib.sha256).hexdigest()


def _key(path: Path) -> bytes:
    """The key in a file, which is made where there is none; a damaged one, which would hide nothing, is made anew."""
    with suppress(FileNotFoundError):
        if len(key := path.read_bytes()) == _KEY_BYTES:
            return key
        path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(secrets.token_bytes(_KEY_BYTES))
        file.flush()
        os.fsync(file.fileno())
    with suppress(FileExistsError):  # of two processes at once, the first one's counts
        os.link(temporary, path)
    temporary.unlink()
    return path.read_bytes()


def _add(digest: Any, path: Path) -> None:
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)


def sampled_fingerprint(model: nn.Module, batches: Iterable[Batch]) -> str:
    """A cheap digest by which processes know that they have the same model and text, by mistake and not by intent.

    Args:
        model: of each parameter its name, type, shape and a few values count.
        batches: all token ids count.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        some = torch.cat([flat[:_SAMPLE], flat[-_SAMPLE:]]).cpu().to(torch.float64)
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode() + some.numpy().tobytes())
    for batch in batches:
        digest.update(batch["input_ids"].numpy().tobytes())
    return digest.hexdigest()
