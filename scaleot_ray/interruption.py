"""Ctrl-C and SIGTERM during a run or a command: one orderly end, whatever comes after."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from scaleot_ray.errors import Interrupted

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def interruptible(remedy: str, what: str = "the run") -> Iterator[Callable[[], None]]:
    """Turns SIGINT and SIGTERM into :class:`Interrupted`, raised once the block has wound down.

    The first signal raises KeyboardInterrupt where the program is; later ones are ignored, so that
    impatience does not leave processes behind. Outside the main thread nothing is changed, and a
    SIGINT that the process was started to ignore (``nohup``, ``&``) stays ignored.

    Args:
        remedy: how to go on.
        what: is interrupted, for the message.

    Yields:
        A function that sets the handlers again, for after a library has put its own in their place.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    caught = [number for number in _SIGNALS if before[number] != signal.SIG_IGN]
    received: list[str] = []

    def interrupt(number: int, _: FrameType | None) -> None:
        # Noted here, because Ray, waiting, raises a KeyboardInterrupt of its own in place of ours.
        received.append(signal.Signals(number).name)
        for each in caught:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    def install() -> None:
        for number in caught:
            signal.signal(number, interrupt)

    install()
    try:
        yield install
    except (KeyboardInterrupt, SystemExit) as error:
        # Ray's own SIGTERM handler, in place while it starts, raises SystemExit.
        name = received[0] if received else "SIGTERM" if isinstance(error, SystemExit) else "SIGINT"
        raise Interrupted(f"{what} was interrupted ({name}).", remedy) from error
    finally:
        for number in caught:
            signal.signal(number, before[number])
