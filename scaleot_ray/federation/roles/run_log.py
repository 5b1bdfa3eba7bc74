"""What happened in a run, a line each with round and data owner: in the run's folder, and in the coordinator's log.

Ray keeps what an actor writes to stderr, so the same lines are in its dashboard and in ``ray logs``.
"""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

_LINE_LIMIT = 4000
_FORMAT = "%(asctime)sZ %(levelname)s %(message)s"


class RunLog:
    """A log that is appended to.

    Args:
        path: file; its folder is made.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._log = logging.Logger("scaleot_ray.run")  # of this run alone, not the process's
        formatter = logging.Formatter(_FORMAT, "%Y-%m-%dT%H:%M:%S")
        formatter.converter = time.gmtime
        for handler in (logging.FileHandler(path, encoding="utf-8", delay=True), logging.StreamHandler(sys.stderr)):
            handler.setFormatter(formatter)
            self._log.addHandler(handler)

    def info(self, what: str, *, round: int | None = None, tenant: str | None = None) -> None:
        """Something that is as it should be."""
        self._log.info(_line(what, round, tenant))

    def warning(self, what: str, *, round: int | None = None, tenant: str | None = None) -> None:
        """Something that an administrator may want to look at."""
        self._log.warning(_line(what, round, tenant))


def _line(what: str, round: int | None, tenant: str | None) -> str:
    keys = [f"{key}={value}" for key, value in (("round", round), ("tenant", tenant)) if value is not None]
    line = " ".join([*keys, " ".join(what.split())])
    # One line of readable text, whatever an error quotes.
    return "".join(character if character.isprintable() else "?" for character in line[:_LINE_LIMIT])
