"""What another party sent may be anything.

Whatever goes wrong in reading it is a refusal, in a message of bounded length.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeGuard

from scaleot_ray.errors import ArtifactRefused, ScaleOTError

PROBLEM_LIMIT = 500
"""Characters of a refusal's problem that are kept, wherever it is recorded."""

_QUOTED = 100


def quoted(value: object, limit: int = _QUOTED) -> str:
    """A value of another party as messages quote it: escaped, so that no terminal obeys it, and of limited length."""
    return shortened(repr(value), limit)


def shortened(text: str, limit: int = PROBLEM_LIMIT) -> str:
    """``text`` as it is, or its beginning with a sign that it was cut; at most ``limit`` characters."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def is_finite_number(value: object) -> TypeGuard[int | float]:
    """Whether ``value`` is a number that is finite as a float too."""
    try:
        return not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False


@contextmanager
def untrusted() -> Iterator[None]:
    """Around reading and checking what another party sent: an error that nobody foresaw is a refusal too.

    Errors with a remedy pass as they are. So does what is not the sender's fault: memory or a disk that does
    not suffice.

    Raises:
        ArtifactRefused: something else was raised; names its type.
    """
    try:
        yield
    except (ScaleOTError, MemoryError, OSError):
        raise
    except Exception as error:
        raise ArtifactRefused(
            f"it cannot be read or checked ({type(error).__name__}: {quoted(str(error))}).",
            "Send the artefact as scaleot_ray wrote it; if it is, this is a mistake of scaleot_ray: report it.",
        ) from error
