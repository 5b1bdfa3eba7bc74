"""Opening files inside an artefact's directory without ever leaving it."""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from scaleot_ray.errors import ArtifactRefused

_LINK_REMEDY = "Copy the artefact with its links resolved (cp -rL), from a place you trust."
_REMEDY = "Fetch the artefact again from its sender, as scaleot_ray wrote it."


@contextmanager
def open_inside(directory: Path, name: str) -> Iterator[tuple[io.FileIO, int]]:
    """An open file of the artefact, unbuffered, and its size in bytes.

    Every folder on the way is opened relative to the one above it and none may be a symbolic link, so
    swapping one in while we read leads nowhere. ``name`` has passed :func:`check_file_name`.

    Raises:
        ArtifactRefused: the file is missing, a symbolic link, no regular file, or cannot be read.
    """
    parts = name.split("/")
    try:
        folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for part in parts[:-1]:
                inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
                os.close(folder)
                folder = inner
            # Opening a pipe for reading would wait for a writer; O_NONBLOCK does not.
            handle = os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
        finally:
            os.close(folder)
    except FileNotFoundError:
        raise ArtifactRefused(f"file {name!r} is missing.", _REMEDY) from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ArtifactRefused(f"file {name!r} is a symbolic link.", _LINK_REMEDY) from None
        raise ArtifactRefused(f"file {name!r} cannot be opened ({error.strerror}).", _REMEDY) from None
    with io.FileIO(handle, "r") as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise ArtifactRefused(f"file {name!r} is no regular file.", _REMEDY)
        yield file, status.st_size


def read_inside(directory: Path, name: str, limit: int) -> bytes:
    """The content of a file of at most ``limit`` bytes.

    Raises:
        ArtifactRefused: :func:`open_inside` refuses it, or it is longer.
    """
    with open_inside(directory, name) as (file, size):
        if size > limit:
            raise ArtifactRefused(f"file {name!r} has {size} bytes, more than the {limit} it may have.", _REMEDY)
        return io.BufferedReader(file).read(size)


def check_listing(directory: Path, expected: Iterable[str]) -> None:
    """Refuses a directory that holds anything but the files of ``expected``.

    Raises:
        ArtifactRefused: a symbolic link, a missing or an extra file; the message names it.
    """
    names = set(expected)
    folders = {"/".join(name.split("/")[:depth]) for name in names for depth in range(1, name.count("/") + 1)}
    found = set()
    for name, entry in _entries(directory, ""):
        if entry.is_symlink():
            raise ArtifactRefused(f"file {name!r} is a symbolic link to {os.readlink(entry.path)!r}.", _LINK_REMEDY)
        if not entry.is_dir(follow_symlinks=False):
            found.add(name)
        elif name not in folders:
            raise ArtifactRefused(f"folder {name!r} is extra: it is not on the manifest.", _extra(name))
    for name in sorted(names - found):
        raise ArtifactRefused(f"file {name!r} is missing.", _REMEDY)
    for name in sorted(found - names):
        raise ArtifactRefused(f"file {name!r} is extra: it is not on the manifest.", _extra(name))


def _entries(directory: Path, prefix: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
    with os.scandir(directory) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            yield prefix + entry.name, entry
            if entry.is_dir(follow_symlinks=False):
                yield from _entries(directory / entry.name, f"{prefix}{entry.name}/")


def _extra(name: str) -> str:
    return f"Move {name!r} out of the directory if you put it there; else ask the sender what it is."
