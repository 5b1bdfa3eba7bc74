"""A directory that appears on disk whole or not at all, and goes as it came."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scaleot_ray.checkpoints import flush
from scaleot_ray.errors import NO_ROOM, ConfigError, ResourcesMissing


@contextmanager
def atomic_directory(directory: str | Path, needed: int, marker: str, overwrite: bool = False) -> Iterator[Path]:
    """An empty sibling directory to write into; on leaving, it is flushed to disk and renamed.

    When the block fails or is interrupted, the sibling is removed and what was at ``directory`` stays.
    An existing directory is swapped for the new one, so both need room for a moment.

    Args:
        directory: the final place.
        needed: bytes that will be written, about.
        marker: a file that every such directory has; without it an existing one is never replaced.
        overwrite: replace what is there.

    Raises:
        ConfigError: the directory exists and ``overwrite`` is off, is something else, or may not be written.
        ResourcesMissing: the disk has less room than needed, before or while writing.
    """
    target = Path(directory).resolve()
    check_replaceable(target, marker, overwrite)
    free = _free_bytes(target)
    if free < needed:
        raise _no_room(target, needed, free)
    partial, replaced = _beside(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        for path in [*partial.rglob("*"), partial]:
            flush(path)
        check_replaceable(target, marker, overwrite)
        _swap(partial, target, replaced)
        flush(target.parent)
    except OSError as error:
        if error.errno in NO_ROOM:
            raise _no_room(target, needed, _free_bytes(target)) from error
        raise ConfigError(
            f"{target}: cannot be written ({error.strerror or error}).", "Choose a folder that you may write to."
        ) from error
    finally:
        try:
            _remove(partial, replaced, target)
        except BaseException:  # a first Ctrl-C or SIGTERM just now; commands ignore those that follow
            _remove(partial, replaced, target)
            raise


def remove_directory(directory: Path) -> None:
    """Removes a directory, if it is there; whoever is killed meanwhile leaves all of it, or nothing under its name."""
    _, replaced = _beside(directory)
    try:
        os.rename(directory, replaced)
    except FileNotFoundError:
        return
    shutil.rmtree(replaced)


def _beside(target: Path) -> tuple[Path, Path]:
    """Names for what is not whole yet, and for what is to go."""
    token = secrets.token_hex(4)
    return target.parent / f".scaleot-{token}.partial", target.parent / f".scaleot-{token}.replaced"


def _remove(partial: Path, replaced: Path, target: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)


def check_replaceable(target: Path, marker: str, overwrite: bool) -> None:
    """Refuses to write where something is that :func:`atomic_directory` would not replace.

    Raises:
        ConfigError: the directory exists and ``overwrite`` is off, or it is something else.
    """
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise ConfigError(f"{target}: exists already.", "Choose another directory, or allow overwriting it.")
    # Overwriting deletes what is there: only ever something of the same sort.
    if not target.is_dir() or (any(target.iterdir()) and not (target / marker).is_file()):
        raise ConfigError(
            f"{target}: exists and holds no {marker}, so it is not overwritten.", "Choose another directory."
        )


def _swap(partial: Path, target: Path, replaced: Path) -> None:
    try:
        if target.exists():
            os.rename(target, replaced)
        os.rename(partial, target)
    except BaseException:
        if replaced.exists() and not target.exists():
            os.rename(replaced, target)
        raise


def _free_bytes(target: Path) -> int:
    return shutil.disk_usage(next(path for path in target.parents if path.exists())).free


def _no_room(target: Path, needed: int, free: int) -> ResourcesMissing:
    return ResourcesMissing(
        f"{target}: writing needs {needed} bytes, the disk has {free} bytes free or allows no file that large.",
        "Free some room or choose a directory on another disk; nothing was left behind.",
    )
