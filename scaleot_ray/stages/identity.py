"""What a stage's result depends on, as one digest: equal digests mean that the result can be reused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from scaleot_ray.config import DataSettings, Settings
from scaleot_ray.data.dataset_key import dataset_key
from scaleot_ray.data.sources import find_sources

_BLOCK = 1 << 20


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


def _add(digest: Any, path: Path) -> None:
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
