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


class Warm:
    """Commands in forks of one process that has the libraries loaded; see :mod:`tests.cli.warm`."""

    def __init__(self, scratch: Path) -> None:
        self._out, self._err = scratch / "out.txt", scratch / "err.txt"
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.cli.warm"],
            cwd=PROJECT,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def scaleot(self, *arguments: object, cwd: Path) -> Finished:
        """Runs ``scaleot`` and waits."""
        return self.run("scaleot", *arguments, cwd=cwd)

    def run(self, *arguments: object, cwd: Path) -> Finished:
        """Runs ``scaleot``, or the script that the first argument names, and waits."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        request = {
            "arguments": [str(argument) for argument in arguments],
            "cwd": str(cwd),
            "out": str(self._out),
            "err": str(self._err),
        }
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        code = int(self._server.stdout.readline())
        out, err = self._out.read_text(encoding="utf-8"), self._err.read_text(encoding="utf-8")
        assert "Traceback" not in out + err, err
        return Finished(code, out, err)

    def stop(self) -> None:
        """Ends the process."""
        self._server.communicate()


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
