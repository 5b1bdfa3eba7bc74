"""Where a command writes: the result on stdout, everything else on stderr.

With ``--format json`` stdout carries exactly one JSON object. Libraries print where they like
(transformers, datasets and Ray's log forwarding all use stdout), so while a command works, file
descriptor 1 points to stderr and the result goes to the descriptor that was saved before.
"""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

import typer

from scaleot_ray.cli.failure import Failure, explain, trace
from scaleot_ray.interruption import interruptible
from scaleot_ray.plain_text import plain_text

if TYPE_CHECKING:
    from rich.console import Console

# Set before the libraries are imported; actors inherit them.
_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
}


class Output:
    """The streams of one command.

    Attributes:
        json: whether the result is a JSON object instead of tables.
        debug: whether libraries may chat and errors show their stack trace.
        listen: to be called after a library has put signal handlers of its own in place.
    """

    def __init__(self) -> None:
        self.json = False
        self.debug = False
        self.listen: Callable[[], None] = lambda: None
        self._stdout: IO[str] | None = None

    def claim(self) -> None:
        """From here on only :meth:`result` reaches stdout; what else is printed lands on stderr."""
        if self._stdout is not None:
            return
        sys.stdout.flush()
        encoding = sys.stdout.encoding or "utf-8"
        self._stdout = os.fdopen(os.dup(1), "w", encoding=encoding, errors="replace")
        os.dup2(2, 1)
        if not self.debug:
            for name, value in _QUIET.items():
                os.environ.setdefault(name, value)
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.filterwarnings("ignore", category=FutureWarning)

    def result(self, document: dict[str, Any], show: Callable[[Console], None]) -> None:
        """Writes the result: ``document`` as JSON, or what ``show`` prints on a console.

        Args:
            document: JSON-able; numbers that are not finite become null.
            show: prints the same result for a person.
        """
        stream = self._stdout or sys.stdout
        try:
            if self.json:
                stream.write(json.dumps(finite(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
            else:
                show(console(stream))
            stream.flush()
        except BrokenPipeError:
            # The reader went away (`scaleot … | head`): the work is done, and nobody is left to tell.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

    def note(self, text: str) -> None:
        """One line for a person, on stderr."""
        print(plain_text(text), file=sys.stderr, flush=True)

    def failure(self, error: BaseException) -> int:
        """Shows an error and returns the exit code."""
        failure = explain(error)
        if self.debug:
            sys.stderr.write(trace(error))
        self._report(failure)
        return failure.code

    def _report(self, failure: Failure) -> None:
        if self.json:
            stream = self._stdout or sys.stdout
            stream.write(json.dumps(failure.as_json(), indent=2, ensure_ascii=False) + "\n")
            stream.flush()
        print(failure.as_text(), file=sys.stderr, flush=True)


def console(stream: IO[str]) -> Console:
    """A console on ``stream``: as wide as the terminal, or 110 columns in a file or pipe."""
    from rich.console import Console

    class Screen(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # rich would end the program; Output.result knows better

    return Screen(file=stream, width=None if stream.isatty() else 110, highlight=False)


@contextmanager
def working(context: typer.Context, again: str) -> Iterator[Output]:
    """Surrounds a command's work: claims stdout, and says how to go on after Ctrl-C.

    A scheduler stops a job with SIGTERM: the same orderly end. Signals that follow do not disturb it.

    Args:
        context: the command's context; its ``obj`` is the :class:`Output`.
        again: what running the same command again does, for the message after an interruption.
    """
    output: Output = context.obj
    output.claim()
    with interruptible(again, str(context.info_name)) as output.listen:
        yield output


def finite(value: Any) -> Any:
    """``value`` with every number that JSON cannot hold (NaN, infinities) as None."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
