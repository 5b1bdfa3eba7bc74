"""The registry's SQLite file: opened safely, written by one coordinator at a time."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scaleot_ray.errors import ConfigError, ResourcesMissing, RunFailed
from scaleot_ray.federation.rounds.registry.local_volume import check_local
from scaleot_ray.federation.rounds.registry.schema import TABLES, UPGRADES, VERSION

KEY = "registry"
"""The setting that names the file."""

_BUSY_SECONDS = 30.0


class Database:
    """A connection. What a ``with writing()`` block did is on the disk when the block is left.

    Whoever opens it to write becomes the writer; one that wrote before finds its next transaction
    refused. So a coordinator that was given up but still lives can change nothing behind its
    successor's back.

    Args:
        path: the file; made where it does not exist and ``write`` is set.
        write: become the writer; else nothing can be changed through this connection.

    Raises:
        ConfigError: it is on a network file system, is no registry, is one of a later version, or does
            not exist.
        ResourcesMissing: the file is damaged or the disk is full.
    """

    def __init__(self, path: Path, write: bool = True) -> None:
        self.path = path
        self._generation: int | None = None  # of the writer; None: only looks
        # A coordinator's threads share the connection, and a transaction is the connection's.
        self._lock = threading.RLock()
        if not write and not path.is_file():
            raise ConfigError(f"{path}: there is no registry.", "Give the folder of a run that has begun.")
        if write:
            check_local(path, KEY)
            path.parent.mkdir(parents=True, exist_ok=True)
        mode = "rwc" if write else "ro"
        with self._in_words():
            self._connection = sqlite3.connect(
                f"file:{_escaped(path)}?mode={mode}",
                uri=True,
                timeout=_BUSY_SECONDS,
                isolation_level=None,
                check_same_thread=False,
            )
            self._connection.row_factory = sqlite3.Row
            if write:
                self._become_writer()
        self._check_version()

    def close(self) -> None:
        """Closes the connection; what is not committed is gone."""
        self._connection.close()

    def rows(self, query: str, *values: object) -> list[sqlite3.Row]:
        """Rows of a query, as one moment's state."""
        with self._lock, self._in_words():
            return self._connection.execute(query, values).fetchall()

    def row(self, query: str, *values: object) -> sqlite3.Row | None:
        """The first row of a query, if there is one."""
        found = self.rows(query, *values)
        return found[0] if found else None

    def execute(self, statement: str, *values: object) -> None:
        """One statement of the transaction that is open."""
        assert self._connection.in_transaction, "outside of writing()"
        with self._in_words():
            self._connection.execute(statement, values)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """A transaction: all of it is on the disk when the block is left, or, where it raises, nothing.

        Raises:
            RunFailed: another coordinator has taken over since this connection was opened.
            ResourcesMissing: the disk is full, or the file is damaged.
        """
        with self._lock, self._in_words():
            if self._generation is None:
                raise RuntimeError(f"{self.path} was opened to look only")
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                found = self._connection.execute("SELECT value FROM meta WHERE key = 'generation'").fetchone()
                if int(found[0]) != self._generation:
                    raise RunFailed(
                        f"{self.path}: another coordinator has taken this run over.",
                        "Look at the run with `scaleot status`; this one changes nothing any more.",
                    )
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def _become_writer(self) -> None:
        execute = self._connection.execute
        execute("PRAGMA journal_mode = WAL")
        # In WAL mode only FULL has a commit on the disk before it returns.
        execute("PRAGMA synchronous = FULL")
        execute("PRAGMA foreign_keys = ON")
        execute("BEGIN IMMEDIATE")
        try:
            if not execute("SELECT 1 FROM sqlite_master").fetchone():
                self._run(TABLES)
                execute("INSERT INTO meta VALUES ('version', ?), ('generation', '0')", (str(VERSION),))
            if not self._upgrade():
                execute("ROLLBACK")
                return  # it is refused, and whoever writes to it goes on
            execute("UPDATE meta SET value = CAST(value AS INTEGER) + 1 WHERE key = 'generation'")
            self._generation = int(execute("SELECT value FROM meta WHERE key = 'generation'").fetchone()[0])
            execute("COMMIT")
        except BaseException:
            execute("ROLLBACK")
            raise

    def _upgrade(self) -> bool:
        """Brings tables of an earlier version up to this one, within a transaction; whether they are of it now."""
        found = self._connection.execute("SELECT value FROM meta WHERE key = 'version'").fetchone()
        version = int(found[0]) if found and found[0].isdecimal() else None
        for number in range(version if version is not None else VERSION, VERSION):
            self._run(UPGRADES[number])
            self._connection.execute("UPDATE meta SET value = ? WHERE key = 'version'", (str(number + 1),))
        return version is not None and version <= VERSION

    def _run(self, statements: str) -> None:
        for statement in statements.split(";\n"):
            self._connection.execute(statement)

    def _check_version(self) -> None:
        found = self.row("SELECT value FROM meta WHERE key = 'version'")
        version = found["value"] if found else "none"
        # Whoever only looks finds one of an earlier version as it was.
        known = {str(VERSION)} | ({str(number) for number in UPGRADES} if self._generation is None else set())
        if version not in known:
            self.close()
            raise ConfigError(
                f"{self.path}: is a registry of version {version}; this scaleot_ray writes version {VERSION}.",
                "Use the scaleot_ray that the run was begun with, or begin a new run.",
            )

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        """SQLite's errors as errors with a remedy."""
        try:
            yield
        except sqlite3.OperationalError as error:
            if "no such table" in str(error):
                raise self._no_registry() from error
            raise ResourcesMissing(
                f"{self.path}: the registry cannot be used ({error}).",
                "Free some room on its disk, or check who may write to its folder; what was acknowledged is not lost.",
            ) from error
        except sqlite3.IntegrityError:
            raise
        except sqlite3.DatabaseError as error:
            if "not a database" in str(error):
                raise self._no_registry() from error
            raise ResourcesMissing(
                f"{self.path}: the registry is damaged ({error}).",
                "Restore the file and its -wal from a copy; its artefacts are beside it, unharmed.",
            ) from error

    def _no_registry(self) -> ConfigError:
        return ConfigError(f"{self.path}: is no registry.", f"Set {KEY} to another file, or to one that a run made.")


def _escaped(path: Path) -> str:
    return str(path.absolute()).replace("%", "%25").replace("?", "%3f").replace("#", "%23")
