"""The package's own command in a process of its own, and the memory it takes."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaleot_ray.errors import RunFailed

_LOOK_SECONDS = 0.1
_PARTS = {"RssAnon": "anonymous", "RssFile": "file"}


@dataclass(frozen=True)
class Watched:
    """What a command did.

    Attributes:
        result: its JSON object.
        seconds: from its start to its end.
        peak: bytes of memory that only swapping could take back (``anonymous``), and of files' pages (``file``), each
            the largest seen, ten looks a second.
    """

    result: dict[str, Any]
    seconds: float
    peak: dict[str, int]


def run_scaleot(arguments: list[str]) -> Watched:
    """Runs ``scaleot``; its progress goes to stderr.

    Raises:
        RunFailed: it ended with an error, which is on stderr.
    """
    program = "import sys; from scaleot_ray.cli.main import main; sys.exit(main())"
    start = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-c", program, *arguments, "--format", "json"], stdout=subprocess.PIPE, text=True
    ) as process:
        peak = dict.fromkeys(_PARTS.values(), 0)
        watch = threading.Thread(target=_watch, args=(process, peak), daemon=True)
        watch.start()
        try:
            output, _ = process.communicate()
        except BaseException:
            process.terminate()
            raise
        watch.join()
    seconds = time.monotonic() - start
    if process.returncode:
        raise RunFailed(f"scaleot {arguments[0]} ended with {process.returncode}.", "See its message above.")
    return Watched(json.loads(output), seconds, peak)


def _watch(process: subprocess.Popen[str], peak: dict[str, int]) -> None:
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        try:
            lines = status.read_text().splitlines()
        except OSError:
            return
        for line in lines:
            key, _, value = line.partition(":")
            if key in _PARTS:
                peak[_PARTS[key]] = max(peak[_PARTS[key]], int(value.split()[0]) * 1024)
        time.sleep(_LOOK_SECONDS)
