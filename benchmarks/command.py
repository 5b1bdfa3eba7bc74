"""What all command lines of benchmarks share: errors without a stack trace, and the line that may be committed."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from scaleot_ray.cli.failure import explain
from scaleot_ray.errors import ScaleOTError


def exit_code_of(run: Callable[[], int], interrupted: str) -> int:
    """Runs a command; its exit code, or that of the error it ended with, which is printed with its remedy.

    Args:
        run: does the work and gives the exit code.
        interrupted: printed after Ctrl-C; says what is kept.
    """
    try:
        return run()
    except ScaleOTError as error:
        failure = explain(error)
        print(failure.as_text(), file=sys.stderr)
        return failure.code
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130


def portable_command(module: str, arguments: Sequence[str], paths: Collection[str]) -> str:
    """The command line as it may be committed: of a path nothing but its last part.

    Args:
        module: what ``python -m`` ran.
        arguments: as given.
        paths: options whose value is a path; other values are taken for one where they are absolute.
    """
    shown, is_path = [], False
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if equals and (option in paths or Path(value).is_absolute()):
            argument = f"{option}={Path(value).name}"
        shown.append(Path(argument).name if is_path or Path(argument).is_absolute() else argument)
        is_path = argument in paths
    return shlex.join(["python", "-m", module, *shown])
