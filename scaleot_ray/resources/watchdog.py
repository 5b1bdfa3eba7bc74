"""Ends what a driver leaves behind that was killed: ``python -m scaleot_ray.resources.watchdog``.

A driver that is killed cannot end its private Ray. Most of Ray's processes notice within a second, some of
its agents after a minute, and nobody removes the folder of its session files. This process holds the other
end of a pipe: when the driver is gone, however that came about, the pipe closes.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scaleot_ray.resources.processes import end_marked, end_users_of


@contextmanager
def watched(name: str, value: str, folder: Path) -> Iterator[None]:
    """Should this process die in here, everything that has ``name=value`` in its environment ends, and ``folder`` goes.

    Args:
        name: of an environment variable.
        value: what those processes have there; the watchdog has not.
        folder: of theirs; whatever of Ray's has a file open in it ends too.
    """
    # A session of its own, so that what a terminal or a scheduler sends to all of us does not end it first.
    watchdog = subprocess.Popen(
        [sys.executable, "-m", __name__, name, value, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        watchdog.kill()
        watchdog.communicate()


if __name__ == "__main__":
    sys.stdin.buffer.read()
    end_marked(sys.argv[1], sys.argv[2])
    end_users_of(Path(sys.argv[3]))
    shutil.rmtree(sys.argv[3], ignore_errors=True)
