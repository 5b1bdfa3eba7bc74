"""What can go wrong, each with what to do about it.

Every error a user can cause is a :class:`ScaleOTError`: one sentence that names the key or file and
what was expected, and one that says what to do. The command line prints both without a stack trace
and exits with the class's code.
"""

from __future__ import annotations

import errno

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""``OSError.errno`` of a full disk, a used-up quota, a file larger than is allowed."""


class ScaleOTError(Exception):
    """Base of all errors with a remedy.

    Args:
        problem: what is wrong; names the key, file or tensor, what was found and what was expected.
        remedy: what the user can do about it.
    """

    exit_code = 5

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem, remedy)
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.problem}\n{self.remedy}"


class ConfigError(ScaleOTError):
    """A setting is unknown, missing, of the wrong type or out of range."""

    exit_code = 2


class UnsupportedArchitectureError(ConfigError):
    """The model's architecture belongs to no family in :mod:`scaleot_ray.families`."""


class DataError(ConfigError):
    """A dataset cannot be read, or its rows are not what the settings say."""


class ArtifactRefused(ScaleOTError):
    """Something that crosses between parties is not what its manifest says, or must not cross."""

    exit_code = 3


class ResourcesMissing(ScaleOTError):
    """Memory, disk, processors or GPUs do not suffice."""

    exit_code = 4


class RunFailed(ScaleOTError):
    """A run started and could not finish: an actor died, a loss became NaN."""

    exit_code = 5


class Interrupted(ScaleOTError):
    """The user stopped the run (Ctrl-C); checkpoints stay usable."""

    exit_code = 130


def disk_full(error: BaseException) -> str | None:
    """The problem in words, where an error is the system's own of a full disk; else None."""
    if not isinstance(error, OSError) or error.errno not in NO_ROOM:
        return None
    where = f" while writing {error.filename}" if error.filename else ""
    return f"the disk is full{where} ({error.strerror})."
