"""Tensor files in the safetensors format, byte for byte what the manifest implies.

The format is eight bytes of header length, a JSON header and the raw values. The library reads it by
mapping the file into memory: what was checked could then change under the reader, and a file that is
truncated meanwhile kills the process. Here every byte is read once into memory of our own, checked
there and handed out. Header and order follow from the manifest, so a file that differs in any byte is
refused; any safetensors reader opens the files written here.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

import torch

from scaleot_ray.artifacts.manifest import TensorEntry
from scaleot_ray.artifacts.manifest_json import MANIFEST_LIMIT
from scaleot_ray.artifacts.raw_bytes import DTYPES, raw_bytes
from scaleot_ray.artifacts.untrusted import quoted
from scaleot_ray.errors import ArtifactRefused

_CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "uint8": "U8",
}
_REMEDY = "Fetch the artefact again from its sender; if it is refused again, do not use it."


def tensor_file_header(entries: Mapping[str, TensorEntry]) -> bytes:
    """First bytes of the file that holds ``entries``: header length and padded JSON header."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in _order(entries):
        entry = entries[name]
        end = start + entry.nbytes
        header[name] = {"dtype": _CODES[entry.dtype], "shape": entry.shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def tensor_offsets(entries: Mapping[str, TensorEntry]) -> dict[str, int]:
    """Where each tensor's raw values begin in the file that holds ``entries``, in bytes from its start."""
    offsets, start = {}, len(tensor_file_header(entries))
    for name in _order(entries):
        offsets[name] = start
        start += entries[name].nbytes
    return offsets


def write_tensor_file(file: io.RawIOBase, entries: Mapping[str, TensorEntry], tensors: Mapping[str, Any]) -> None:
    """Writes ``tensors`` (contiguous, on the CPU) without copying them.

    Raises:
        OSError: the system's own error, e.g. ENOSPC.
    """
    _write(file, memoryview(tensor_file_header(entries)))
    for name in _order(entries):
        _write(file, raw_bytes(tensors[name]).data)


def read_tensor_file(
    file: io.RawIOBase, size: int, file_name: str, entries: Mapping[str, TensorEntry]
) -> dict[str, torch.Tensor]:
    """The tensors of a file of ``size`` bytes, each in memory of its own.

    Values are not checked here: :meth:`Artifact.verify` does that on the memory that is handed out.

    Raises:
        ArtifactRefused: the file is truncated or too long, or its header is not what the manifest
            implies; the message names the file, and the tensor where there is one.
    """
    check_tensor_file(file, size, file_name, entries)
    tensors = {}
    for name in _order(entries):
        tensor = torch.empty(entries[name].shape, dtype=DTYPES[entries[name].dtype])
        fill(file, raw_bytes(tensor).data, file_name, name)
        tensors[name] = tensor
    return {name: tensors[name] for name in entries}


def check_tensor_file(file: io.RawIOBase, size: int, file_name: str, entries: Mapping[str, TensorEntry]) -> None:
    """Reads the header of a file of ``size`` bytes, and leaves the file where its first tensor begins.

    Raises:
        ArtifactRefused: the file is truncated or too long, or its header is not what the manifest
            implies; the message names the file, and the tensor where there is one.
    """
    expected = tensor_file_header(entries)
    found = _read_up_to(file, len(expected))
    if found != expected:
        announced = 8 + int.from_bytes(found[:8], "little")
        if len(found) == len(expected) < announced <= min(size, MANIFEST_LIMIT):
            found += _read_up_to(file, announced - len(found))
        raise ArtifactRefused(f"file {file_name!r}: {_difference(found, size, entries)}.", _REMEDY)
    total = len(expected) + sum(entry.nbytes for entry in entries.values())
    if size != total:
        what = "truncated" if size < total else "too long"
        raise ArtifactRefused(f"file {file_name!r} is {what}: {size} bytes, expected {total}.", _REMEDY)


def _order(entries: Mapping[str, TensorEntry]) -> list[str]:
    # Wide types first, so that every tensor starts at a multiple of its type's size.
    return sorted(entries, key=lambda name: (-DTYPES[entries[name].dtype].itemsize, name))


def _difference(found: bytes, size: int, entries: Mapping[str, TensorEntry]) -> str:
    """Why a header is refused, as precisely as it can be read."""
    length = int.from_bytes(found[:8], "little")
    if len(found) < 8 or 8 + length > size:
        return f"it is truncated or no safetensors file ({size} bytes)"
    try:
        header = json.loads(found[8 : 8 + length])
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        return "its safetensors header is damaged"
    header.pop("__metadata__", None)
    for name in sorted(entries.keys() - header.keys()):
        return f"tensor {name!r} is missing"
    for name in sorted(header.keys() - entries.keys()):
        return f"tensor {quoted(name)} is extra: it is not on the manifest"
    for name, entry in entries.items():
        place = header[name] if isinstance(header[name], dict) else {}
        if place.get("dtype") != _CODES[entry.dtype]:
            return f"tensor {name!r} has type {quoted(place.get('dtype'))}, the manifest says {entry.dtype}"
        if place.get("shape") != entry.shape:
            return f"tensor {name!r} has shape {quoted(place.get('shape'))}, the manifest says {entry.shape}"
    return "its safetensors header was altered"


def _write(file: io.RawIOBase, data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += file.write(data[done:]) or 0


def fill(file: io.RawIOBase, data: memoryview, file_name: str, name: str) -> None:
    """Reads values of the tensor ``name`` from where ``file`` stands until ``data`` is full.

    Raises:
        ArtifactRefused: the file ends before; names file and tensor.
    """
    done = 0
    while done < len(data):
        count = file.readinto(data[done:])
        if not count:
            raise ArtifactRefused(f"file {file_name!r} is truncated within tensor {name!r}.", _REMEDY)
        done += count


def _read_up_to(file: io.RawIOBase, count: int) -> bytes:
    data = bytearray(count)
    done = 0
    while done < count and (read := file.readinto(memoryview(data)[done:])):
        done += read
    return bytes(data[:done])
