"""Runs ``scaleot`` as people do: in a process of its own, looking at what it prints and returns."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[2]


@dataclass
class Finished:
    """What a command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Stdout as the one JSON object it must be."""
        document = json.loads(self.out)
        assert isinstance(document, dict)
        return document

    @property
    def error(self) -> dict[str, Any]:
        """The error object of ``--format json``, after checking that it is all there is."""
        document = self.json
        assert list(document) == ["error"]
        error: dict[str, Any] = document["error"]
        assert set(error) == {"code", "type", "message", "remedy"}
        assert error["code"] == self.code
        return error


def environment(**more: str) -> dict[str, str]:
    """Environment of a command under test: one thread, no network, a plain terminal."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TERM": "dumb", "COLUMNS": "100", **more}


def scaleot(*arguments: object, cwd: Path | None = None, timeout: float = 240, **env: str) -> Finished:
    """Runs ``scaleot`` and waits; no command may ever show a stack trace."""
    return python("-m", "scaleot_ray.cli", *arguments, cwd=cwd, timeout=timeout, **env)


def python(*arguments: object, cwd: Path | None = None, timeout: float = 240, **env: str) -> Finished:
    """Runs Python with these arguments and waits."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=environment(**env),
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=timeout,
        check=False,
    )
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    return Finished(done.returncode, done.stdout, done.stderr)


@contextmanager
def started(*arguments: object, cwd: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    """A running ``scaleot`` that can be sent signals; killed at the end if it is still there."""
    process = subprocess.Popen(
        [sys.executable, "-m", "scaleot_ray.cli", *map(str, arguments)],
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        # A test run in the background ignores Ctrl-C, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
