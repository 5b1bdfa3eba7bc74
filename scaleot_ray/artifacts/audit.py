"""The audit log: one line for every crossing, sent or refused, each with the digest of the line before.

The chain shows that a line is missing, was altered or was put in between. It does not show that the last
lines are missing, nor that someone wrote the whole log anew: for that, keep :meth:`AuditLog.head` somewhere
else (a run's report has it).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from scaleot_ray.artifacts.untrusted import shortened
from scaleot_ray.errors import ResourcesMissing

Decision = Literal["sent", "received", "refused"]

MODEL_OWNER = "model owner"
DATA_OWNERS = "data owners"
"""Whoever the model owner hands an emulator's folder to."""
UNKNOWN_SENDER = "unknown sender"
"""Whoever sends something in a name that it cannot show to be its own."""

_LOG = logging.getLogger(__name__)
_KEYS = {"time", "sender", "recipient", "kind", "bytes", "digest", "decision", "reason"}
_TAIL = 4096


def data_owner(name: str) -> str:
    """Name of a data owner in messages and in the audit log."""
    return name if name == "data owner" else f"data owner {name}"


def evaluator(name: str) -> str:
    """Name of the evaluator of one data owner's rows."""
    return f"evaluator {name}"


def tenant_of(party: str) -> str | None:
    """The data owner that a party is, or measures for; None for any other party."""
    for prefix in (data_owner(""), evaluator("")):
        if party.startswith(prefix):
            return party.removeprefix(prefix)
    return None


class AuditLog:
    """An append-only file of JSON lines that several processes may write at once.

    Each line has ``time`` (ISO 8601, UTC), ``sender``, ``recipient``, ``kind``, ``bytes``, ``digest``,
    ``decision``, ``reason`` and ``previous`` (SHA-256 of the bytes of the line before, without its end;
    empty in the first line). It is one write and is on the disk when :meth:`record` returns.

    Args:
        path: of the file.
        on_record: is told each line that was written here.

    Attributes:
        damaged: numbers (from 1) of the lines that the latest :meth:`read` left out, because a
            process died while writing them.
        broken: numbers of the lines whose ``previous`` is not the line before, by the latest
            :meth:`read`: there, lines are missing, or the one before was altered.
    """

    def __init__(self, path: str | Path, on_record: Callable[[Mapping[str, Any]], None] | None = None) -> None:
        self.path, self._on_record = Path(path), on_record
        self.damaged: list[int] = []
        self.broken: list[int] = []

    def record(
        self,
        sender: str,
        recipient: str,
        kind: str,
        bytes: int,
        digest: str,
        decision: Decision = "sent",
        reason: str | None = None,
    ) -> None:
        """Appends one crossing.

        Args:
            sender, recipient: parties.
            kind: of the artefact; in a run also ``table``, and what a declared evaluator is given: ``full
                model``, ``rows``.
            bytes, digest: of that, the manifest included, as it says; 0 and nothing where not even that could be
                read, no digest of rows.
            decision: ``sent`` by the party that sends, or by the coordinator between two; ``received`` by
                one that received it as a folder; ``refused`` by either.
            reason: why one was refused, or crosses past the gate; the log has its first 500 characters.

        Raises:
            ResourcesMissing: the line cannot be written; what it is about must not cross then.
        """
        line: dict[str, Any] = {
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "sender": sender,
            "recipient": recipient,
            "kind": kind,
            "bytes": bytes,
            "digest": digest,
            "decision": decision,
            "reason": shortened(reason) if reason is not None else None,
        }
        try:
            with self._appending() as (handle, size):
                # A line that a dying process cut short must not swallow this one.
                start = b"" if size == 0 or os.pread(handle, 1, size - 1) == b"\n" else b"\n"
                line["previous"] = _digest(_last_line(handle, size))
                data = start + json.dumps(line).encode() + b"\n"
                try:
                    if os.write(handle, data) != len(data):
                        raise OSError("the disk took only part of the line")
                    os.fsync(handle)
                except OSError:
                    os.ftruncate(handle, size)
                    raise
        except OSError as error:
            raise ResourcesMissing(
                f"audit log {self.path}: cannot be written ({error.strerror or error}).",
                "Free some room, or name an audit log that may be written; nothing crosses without its line.",
            ) from error
        if self._on_record is not None:
            self._on_record(line)

    def read(self) -> list[dict[str, Any]]:
        """All complete lines, oldest first; an empty list where there is no log yet.

        Lines cut short by a process that died are left out, listed in :attr:`damaged` and logged as a
        warning, as are breaks of the chain, listed in :attr:`broken`.
        """
        self.damaged, self.broken = [], []
        entries, previous = [], ""
        text = self.path.read_bytes() if self.path.exists() else b""
        for number, line in enumerate(text.removesuffix(b"\n").split(b"\n") if text else [], start=1):
            try:
                entry = json.loads(line)
            except ValueError:
                entry = None
            if isinstance(entry, dict) and entry.keys() >= _KEYS:
                entries.append(entry)
                if entry.get("previous") != previous:
                    self.broken.append(number)
            else:
                self.damaged.append(number)
            previous = _digest(line)
        if self.damaged:
            _LOG.warning("audit log %s: incomplete lines %s; their crossings are not known", self.path, self.damaged)
        if self.broken:
            _LOG.warning("audit log %s: lines are missing or altered before lines %s", self.path, self.broken)
        return entries

    def head(self) -> str:
        """SHA-256 of the last line; empty where there is none."""
        if not self.path.exists():
            return ""
        with self.path.open("rb") as file:
            return _digest(_last_line(file.fileno(), os.fstat(file.fileno()).st_size))

    @contextmanager
    def _appending(self) -> Iterator[tuple[int, int]]:
        """An open handle under an exclusive lock, and the file's size."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield handle, os.fstat(handle).st_size
        finally:
            os.close(handle)


def _digest(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest() if line else ""


def _last_line(handle: int, size: int) -> bytes:
    """Bytes of a file's last line, without its end; the line may lack its end."""
    end = size - 1 if size and os.pread(handle, 1, size - 1) == b"\n" else size
    start, tail = end, b""
    while start > 0 and b"\n" not in tail:
        step = min(start, _TAIL)
        start -= step
        tail = os.pread(handle, step, start) + tail
    return tail.rpartition(b"\n")[2]
