"""Errors as people and programs see them: a problem, a remedy and an exit code, no stack trace."""

from __future__ import annotations

import os
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaleot_ray.errors import ResourcesMissing, RunFailed, ScaleOTError, disk_full
from scaleot_ray.plain_text import plain_text


@dataclass(frozen=True)
class Failure:
    """What went wrong.

    Attributes:
        code: the exit code.
        type: name of the error's class.
        message: what is wrong.
        remedy: what to do about it.
    """

    code: int
    type: str
    message: str
    remedy: str

    def as_json(self) -> dict[str, Any]:
        """The object that ``--format json`` prints in place of a result."""
        return {
            "error": {"code": self.code, "type": self.type, "message": self.message, "remedy": self.remedy},
        }

    def as_text(self) -> str:
        """The lines that a person reads; a message may quote what another party wrote."""
        return plain_text(f"error: {self.message}\n  → {self.remedy}")


def explain(error: BaseException) -> Failure:
    """Any exception as a :class:`Failure`.

    Errors of the package keep their own words. Running out of memory or disk is said as such. For
    everything else, the trace goes to a file that the remedy names.
    """
    if isinstance(error, ScaleOTError):
        return Failure(error.exit_code, _name(error), error.problem, error.remedy)
    if (full := disk_full(error)) is not None:
        return Failure(
            ResourcesMissing.exit_code,
            ResourcesMissing.__name__,
            full,
            "Free some space or choose another --output, then run the same command again.",
        )
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        first = (str(error).splitlines() or [""])[0]
        return Failure(
            ResourcesMissing.exit_code,
            ResourcesMissing.__name__,
            f"out of memory. {first}".strip(),
            "Use a smaller batch_size or block_size (--set), or a machine with more memory; "
            "`scaleot doctor` shows what there is.",
        )
    written = write_trace(error)
    where = f"is in {written}; --debug shows it here" if written else "could not be written; --debug shows it here"
    first = (str(error).strip().splitlines() or ["(no message)"])[0]
    return Failure(
        RunFailed.exit_code,
        type(error).__name__,
        f"unexpected {type(error).__name__}: {first[:300]}",
        f"The full trace {where}. Please report it with the command you ran; it may quote values of rows.",
    )


def write_trace(error: BaseException) -> Path | None:
    """Writes the stack trace of ``error`` to a file of its own in the temporary folder, for its owner alone.

    None where that is not possible, such as on a full disk: what went wrong first is what counts.
    """
    place = None
    try:
        handle, place = tempfile.mkstemp(".txt", f"scaleot-error-{time.strftime('%Y%m%d-%H%M%S')}-")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{' '.join(sys.argv)}\n\n{trace(error)}")
    except OSError:
        if place is not None:
            with suppress(OSError):
                os.unlink(place)
        return None
    return Path(place)


def trace(error: BaseException) -> str:
    """The stack trace of ``error`` as text."""
    return "".join(traceback.format_exception(type(error), error, error.__traceback__))


def _name(error: ScaleOTError) -> str:
    # Ray raises a subclass made on the fly for an error from an actor; people want the class they can look up.
    for kind in type(error).__mro__:
        if kind.__module__ == ScaleOTError.__module__:
            return kind.__name__
    return type(error).__name__
