"""A file system of ``pyarrow.fs`` over a local folder, which can run full, lose files, or stop to answer."""

from __future__ import annotations

import errno
import io
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow.fs import FileInfo, FileSelector, FileSystemHandler, FileType, LocalFileSystem, PyFileSystem

from scaleot_ray.federation.rounds.artifact_location import Location


class FaultyHandler(FileSystemHandler):
    """Files below a folder.

    Attributes:
        room: bytes that may still be written; what is written beyond is lost, as where a connection breaks.
        answers: operations that are still carried out; None: all.
        garbles: what is written is not what is sent.
        written: paths of the files that were opened to be written.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.local = root, LocalFileSystem()
        self.room: int | None = None
        self.answers: int | None = None
        self.garbles = False
        self.written: list[str] = []

    def at(self, path: str) -> str:
        """A path in the local folder; every operation asks for one."""
        if self.answers is not None:
            if self.answers == 0:
                raise OSError(errno.ETIMEDOUT, "no answer")
            self.answers -= 1
        return str(self.root / path)

    def get_type_name(self) -> str:
        return "faulty"

    def normalize_path(self, path: str) -> str:
        return path

    def _info(self, path: str) -> FileInfo:
        found = self.local.get_file_info(self.at(path))
        return FileInfo(path, found.type, size=found.size)

    def get_file_info(self, paths: list[str]) -> list[FileInfo]:
        return [self._info(path) for path in paths]

    def get_file_info_selector(self, selector: FileSelector) -> list[FileInfo]:
        folder = Path(self.at(selector.base_dir))
        if not folder.exists() and selector.allow_not_found:
            return []
        return [self._info(f"{selector.base_dir}/{path.name}") for path in sorted(folder.iterdir())]

    def create_dir(self, path: str, recursive: bool) -> None:
        self.local.create_dir(self.at(path), recursive=recursive)

    def delete_dir(self, path: str) -> None:
        self.local.delete_dir(self.at(path))

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        self.local.delete_dir_contents(self.at(path), missing_dir_ok=missing_dir_ok)

    def delete_root_dir_contents(self) -> None:
        raise NotImplementedError

    def delete_file(self, path: str) -> None:
        self.local.delete_file(self.at(path))

    def move(self, src: str, dest: str) -> None:
        raise NotImplementedError  # as good as object stores can

    def copy_file(self, src: str, dest: str) -> None:
        self.local.copy_file(self.at(src), self.at(dest))

    def open_input_stream(self, path: str) -> Any:
        if self.local.get_file_info(self.at(path)).type == FileType.NotFound:
            raise FileNotFoundError(path)
        return pa.PythonFile(open(self.at(path), "rb"), mode="r")

    def open_input_file(self, path: str) -> Any:
        return self.open_input_stream(path)

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        self.written.append(path)
        return pa.PythonFile(_Sink(self, self.at(path)), mode="w")

    def open_append_stream(self, path: str, metadata: Any) -> Any:
        raise NotImplementedError


class _Sink(io.RawIOBase):
    """What reaches the file shows at once, also when the rest never does."""

    def __init__(self, handler: FaultyHandler, path: str) -> None:
        self._handler, self._file = handler, open(path, "wb")  # noqa: SIM115

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        data = bytes(data)
        if self._handler.garbles:
            data = bytes([data[0] ^ 1]) + data[1:]
        room = self._handler.room
        self._file.write(data if room is None else data[:room])
        if room is not None:
            self._handler.room = max(room - len(data), 0)
            if len(data) > room:
                raise OSError(errno.EPIPE, "connection lost")
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def faulty(root: Path) -> tuple[Location, FaultyHandler]:
    """A place for artefacts on such a file system, and what makes it fail."""
    root.mkdir()
    handler = FaultyHandler(root)
    return Location("faulty://store/runs?speed=1", "runs", PyFileSystem(handler)), handler
