"""An actor's failure as an error with a remedy: which role, why, and the last lines of its log."""

from __future__ import annotations

import re
from pathlib import Path

from ray.exceptions import ActorDiedError, GetTimeoutError, OutOfMemoryError, RayActorError, RayError, RayTaskError

from scaleot_ray.errors import ResourcesMissing, RunFailed, ScaleOTError, disk_full

_LOG_LINES = 8
_MAGIC = re.compile(r"^:(actor_name|job_id|task_name):")  # what Ray writes into logs for itself
_LESS_MEMORY = (
    "Lower batch_size or block_size of its section, set tune.gradient_checkpointing, or use a larger machine."
)
_AGAIN = "Run the same command again: finished parts are reused, the rest goes on from its checkpoints."


def actor_failure(
    error: BaseException,
    role: str,
    pid: int | None,
    logs: Path,
    elsewhere: str | None = None,
    less_memory: str = _LESS_MEMORY,
) -> ScaleOTError:
    """What happened to an actor, out of the exception that waiting for it raised.

    Errors of this package keep their class (and exit code); the role is named in front. Everything
    else becomes :class:`RunFailed`, running out of memory or disk :class:`ResourcesMissing`.

    Args:
        error: what ``ray.get`` raised.
        role: who failed, e.g. ``data owner alice``.
        pid: its process, if it is known.
        logs: folder of the workers' logs.
        elsewhere: address of its node, where that is not ours.
        less_memory: what to do where its own memory did not suffice.
    """
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, ScaleOTError):
        return _named(cause, role)
    if isinstance(cause, MemoryError) or (type(cause).__name__ == "OutOfMemoryError" and not _from_ray(cause)):
        return ResourcesMissing(
            f"{role} ran out of memory: {_first_line(str(cause))}",
            less_memory,
        )
    if (full := disk_full(cause)) is not None:
        return ResourcesMissing(
            f"{role}: {full}", f"Free some space, or set output to a folder on another disk. {_AGAIN}"
        )
    if isinstance(cause, OutOfMemoryError):
        return RunFailed(
            f"{role} was ended because the machine ran out of memory.",
            f"Lower batch_size or block_size, or close other programs. {_AGAIN}",
        )
    if isinstance(cause, RayActorError):
        return RunFailed(f"{role} died: {_why(cause, elsewhere)}.{_log_tail(pid, logs)}", _AGAIN)
    if isinstance(cause, GetTimeoutError) or _from_ray(cause):
        return RunFailed(f"{role}: Ray failed: {_first_line(str(cause))}{_log_tail(pid, logs)}", _AGAIN)
    place = _place(str(error)) if isinstance(error, RayTaskError) else ""
    return RunFailed(
        f"{role} failed: {type(cause).__name__}: {_first_line(str(cause))}{place}",
        f"Please report this with the settings you used. {_AGAIN}",
    )


def has_died(error: BaseException) -> bool:
    """Whether the actor's process ended from outside, so that a new one may well come through.

    Not where it could not even start: the next one could not either.
    """
    if isinstance(error, RayTaskError):
        return False  # it lives, and said what is wrong
    started = not (isinstance(error, ActorDiedError) and "creation task" in str(error))
    return isinstance(error, OutOfMemoryError) or (isinstance(error, RayActorError) and started)


def _named(error: ScaleOTError, role: str) -> ScaleOTError:
    # Ray hands over a subclass made on the fly; people look up the class that they know.
    kind = next(kind for kind in type(error).__mro__ if kind.__module__ == ScaleOTError.__module__)
    problem = error.problem if role in error.problem else f"{role}: {error.problem}"
    named: ScaleOTError = kind(problem, error.remedy)
    return named


def _why(error: RayActorError, elsewhere: str | None) -> str:
    """One sentence about a dead actor's end."""
    text = str(error)
    if isinstance(error, ActorDiedError) and "creation task" in text:
        # An exception in the constructor, or while its modules were imported: the last line says which.
        lines = [line for line in text.splitlines() if line.strip()]
        return f"it could not start: {lines[-1].strip()}"
    if "its node has died" in text:
        return f"its node{f' {elsewhere}' if elsewhere else ''} was {'preempted' if error.preempted else 'lost'}"
    if "SIGTERM" in text:
        return "its process was ended by SIGTERM"
    found = re.search(r"exit code (-?\d+)", text)
    if found and found.group(1) not in ("0", "-1"):
        return f"its process ended with exit code {found.group(1)}"
    if elsewhere:
        # All that shows at first of a node that is gone are broken connections.
        return f"its process on node {elsewhere} was killed, or that node was lost"
    return "its process was killed (by SIGKILL, the system's out-of-memory killer, or a crash)"


def _log_tail(pid: int | None, logs: Path) -> str:
    """The last lines that an actor's process wrote to stderr."""
    if pid is None:
        return ""
    lines: list[str] = []
    for path in sorted(logs.glob(f"worker-*-{pid}.err")):
        text = path.read_text(encoding="utf-8", errors="replace").splitlines()
        lines += [line for line in text if line.strip() and not _MAGIC.match(line)]
    return "".join(f"\n  | {line}" for line in lines[-_LOG_LINES:])


def _place(trace: str) -> str:
    """File and line of the last frame in our own code."""
    found = re.findall(r'File "[^"]*(scaleot_ray/[^"]+)", line (\d+)', trace)
    return f" ({found[-1][0]}, line {found[-1][1]})" if found else ""


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or ["(no message)"])[0][:300]


def _from_ray(error: BaseException) -> bool:
    return isinstance(error, RayError)
