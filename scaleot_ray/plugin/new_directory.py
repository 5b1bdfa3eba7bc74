"""A directory that appears whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from scaleot_ray.errors import ConfigError, ResourcesMissing
from scaleot_ray.tuning.checkpoint import no_room

_MARKS = ("config.json", "adapter_config.json")  # what an earlier export is known by


@contextmanager
def new_directory(directory: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling to write into, renamed to ``directory`` when the block ends without an error.

    Raises:
        ConfigError: ``directory`` exists and ``overwrite`` is off, or it holds something else than an
            export, or the place may not be written.
        ResourcesMissing: the disk is full. Nothing is left behind, and an earlier export is still there.
    """
    target = Path(directory).resolve()
    _check(target, overwrite)
    token = secrets.token_hex(4)
    partial, old = (target.parent / f".scaleot-{token}.{end}" for end in ("partial", "replaced"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        for path in (*partial.rglob("*"), partial):
            _sync(path)
        if target.exists():
            os.replace(target, old)
        try:
            os.replace(partial, target)
        except OSError:
            if old.exists():
                os.replace(old, target)
            raise
        _sync(target.parent)
    except (OSError, SafetensorError) as error:
        if no_room(error):
            raise ResourcesMissing(
                f"{target}: no room to write it ({error}).", "Free disk space and try again."
            ) from error
        raise ConfigError(f"{target}: cannot be written ({error}).", "Give a folder that can be written.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


def _check(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise ConfigError(f"{target}: is a file.", "Give the path of a new folder.")
    empty = not any(target.iterdir())
    if empty:
        return
    if not overwrite:
        raise ConfigError(f"{target}: exists already.", "Give another folder, or allow overwriting it.")
    if not any((target / mark).is_file() for mark in _MARKS):
        raise ConfigError(f"{target}: holds something else than an export.", "Give another folder.")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot sync directories
            raise
    finally:
        os.close(descriptor)
