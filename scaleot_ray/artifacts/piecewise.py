"""An artefact on disk whose tensors are read piece by piece.

For what must not grow with the number of artefacts, or with their size: aggregation reads the same
piece of every data owner's delta, and keeps none of them. Every byte is checked as it passes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch

from scaleot_ray.artifacts.artifact import altered
from scaleot_ray.artifacts.directory import check_listing, open_inside
from scaleot_ray.artifacts.manifest import CHECKSUM_FILE, MANIFEST_FILE, Manifest
from scaleot_ray.artifacts.raw_bytes import DTYPES, raw_bytes
from scaleot_ray.artifacts.storage import about, entries_by_file, read_files, read_manifest
from scaleot_ray.artifacts.tensor_file import check_tensor_file, fill, tensor_offsets
from scaleot_ray.errors import ArtifactRefused

_VERIFIED_VALUES = 1 << 20  # held at a time


class StoredArtifact:
    """An artefact in a directory; no file of it stays open between two pieces.

    Attributes:
        directory: where it lies.
        manifest: what it says of itself.

    Args:
        directory: what :func:`~scaleot_ray.artifacts.storage.write_artifact` wrote.

    Raises:
        ArtifactRefused: the manifest is damaged, a file is missing, extra, truncated or has another
            header than the manifest implies. Values are checked when they are read.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.manifest: Manifest = read_manifest(self.directory)
        self._offsets: dict[str, int] = {}
        files = entries_by_file(self.manifest)
        with about(self.directory):
            check_listing(self.directory, [MANIFEST_FILE, CHECKSUM_FILE, *files, *self.manifest.files])
            for name, entries in files.items():
                with open_inside(self.directory, name) as (file, size):
                    check_tensor_file(file, size, name, entries)
                self._offsets |= tensor_offsets(entries)

    def verify(self) -> None:
        """Reads all of it once, and keeps nothing.

        Raises:
            ArtifactRefused: a tensor or a file is not what the manifest says; names the directory, and it.
        """
        for name, entry in self.manifest.tensors.items():
            try:
                for _ in self.pieces(name, _VERIFIED_VALUES):
                    pass
            except ArtifactRefused as error:
                raise ArtifactRefused(f"{error.problem.removesuffix('.')} (in {entry.file}).", error.remedy) from None
        read_files(self.directory, self.manifest)

    def pieces(self, name: str, values: int) -> Iterator[torch.Tensor]:
        """A tensor's values in row-major order, at most ``values`` of them at a time.

        Every piece is in memory of its own. What all of them say together is only known to be right
        once the last one has been taken: what is made of them must not be used before.

        Args:
            name: of a tensor on the manifest.
            values: of one piece; a whole tensor of that size or less is one piece.

        Raises:
            ArtifactRefused: the file is truncated, cannot be read, or the tensor's SHA-256 is not the
                manifest's, which shows at its last piece; names the directory and the tensor.
        """
        entry, place, digest = self.manifest.tensors[name], self._offsets[name], hashlib.sha256()
        for start in range(0, max(entry.parameters, 1), values):
            piece = torch.empty(min(values, entry.parameters - start), dtype=DTYPES[entry.dtype])
            data = raw_bytes(piece).data
            # Opened anew for every piece: a thousand data owners would run out of file handles.
            with about(self.directory):
                with open_inside(self.directory, entry.file) as (file, _):
                    file.seek(place)
                    fill(file, data, entry.file, name)
                digest.update(data)
                place += len(data)
                if start + values >= entry.parameters and digest.hexdigest() != entry.sha256:
                    raise altered(name)
            yield piece
