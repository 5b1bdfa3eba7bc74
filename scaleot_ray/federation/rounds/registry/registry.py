"""What is known of a run, on disk: data owners, rounds, submissions, plug-ins, and what was made from what.

Everything a coordinator needs to go on after it died. A method that changes something has it on the disk
when it returns; only then is anything acknowledged.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from secrets import token_hex
from types import TracebackType

from scaleot_ray.artifacts.manifest import Manifest
from scaleot_ray.artifacts.tensor_roles import emulator_content
from scaleot_ray.federation.rounds.registry.database import Database
from scaleot_ray.federation.rounds.registry.plug_ins import PlugIns
from scaleot_ray.federation.rounds.registry.rounds import Rounds
from scaleot_ray.federation.rounds.registry.submissions import Submissions
from scaleot_ray.federation.rounds.registry.tenants import Tenants


class Registry:
    """The registry of one run; a context manager that closes it.

    Attributes:
        tenants, rounds, submissions, plug_ins: its tables.

    Args:
        path: its file.
        write: as its coordinator, the only one that may then change it; else only to look.
        clock: seconds since 1970, UTC.

    Raises:
        ConfigError, ResourcesMissing: as :class:`~scaleot_ray.federation.rounds.registry.database.Database`.
    """

    def __init__(self, path: Path, write: bool = True, clock: Callable[[], float] = time.time) -> None:
        self._database, self._clock, self._write = Database(path, write), clock, write
        self.tenants = Tenants(self._database, clock)
        self.rounds = Rounds(self._database, clock, self.tenants)
        self.submissions = Submissions(self._database, clock, self.rounds)
        self.plug_ins = PlugIns(self._database, clock, self.rounds)

    def __enter__(self) -> Registry:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        self._database.close()

    def add_emulator(self, manifest: Manifest, folder: Path) -> None:
        """Records an emulator that rounds are about; of one that is known, where it lies now."""
        content = emulator_content(manifest)
        settings = content.model_dump(mode="json", include={"builder", "plug_in_layers", "layout", "alpha", "beta"})
        with self._database.writing():
            self._database.execute(
                "INSERT INTO emulators VALUES (?, ?, ?, ?, ?, ?, ?) "
                "ON CONFLICT (digest) DO UPDATE SET folder = excluded.folder",
                manifest.digest(),
                manifest.base_model,
                content.base_digest,
                str(folder),
                json.dumps(settings),
                manifest.library_version,
                self._clock(),
            )

    def identity(self) -> str:
        """A random name that stays with the file wherever it is moved; another registry has another.

        Of one that is opened to look only it may be empty: that has never been written to by a coordinator.
        """
        if self._write and not self._noted("identity"):
            with self._database.writing():
                self._database.execute("INSERT INTO meta VALUES ('identity', ?) ON CONFLICT DO NOTHING", token_hex(8))
        return self._noted("identity")

    def artifacts(self) -> str:
        """The setting that says where its artefacts are kept; empty where none ever did."""
        return self._noted("artifacts")

    def note_artifacts(self, text: str, place: str) -> None:
        """Records where its artefacts are kept from now on.

        Args:
            text: the setting.
            place: what has a folder for each artefact, named by its digest.
        """
        with self._database.writing():
            self._database.execute("INSERT OR REPLACE INTO meta VALUES ('artifacts', ?)", text)
            for table in ("submissions", "plug_ins"):
                self._database.execute(f"UPDATE {table} SET folder = ? || '/' || digest", place)

    def _noted(self, key: str) -> str:
        row = self._database.row("SELECT value FROM meta WHERE key = ?", key)
        return str(row["value"]) if row else ""

    def emulator(self) -> tuple[str, Path] | None:
        """Digest and folder of the emulator that was added last; None where there is none yet."""
        row = self._database.row("SELECT digest, folder FROM emulators ORDER BY created DESC, rowid DESC")
        return (row["digest"], Path(row["folder"])) if row else None
