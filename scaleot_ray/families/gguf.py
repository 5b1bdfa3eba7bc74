"""The metadata of a GGUF file, read without touching its tensors.

transformers takes seconds for the same; the architecture, the licence and whether the file is whole are
wanted before that.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import mmap
import struct
from math import prod
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType

from scaleot_ray.errors import ConfigError

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9

Value = str | int | float | bool


def gguf_metadata(path: Path) -> dict[str, Value]:
    """Scalar and string metadata of a GGUF file.

    Arrays, such as the vocabulary, are stepped over; how many items they have stands under ``KEY.length``.

    Raises:
        ConfigError: the file is no GGUF file of version 2 or 3, ends before its last tensor does, or scales
            rotary positions, which transformers leaves out when it reads GGUF: the model would be another.
    """
    remedy = "Give a complete .gguf file (download it again), or a Hugging Face directory."
    with path.open("rb") as file:
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                if data[:4] != b"GGUF" or struct.unpack_from("<I", data, 4)[0] not in (2, 3):
                    raise ConfigError(f"model.path: {path} is no GGUF file of version 2 or 3.", remedy)
                values, at = _entries(data)
                alignment = int(values.get("general.alignment", GGUF_DEFAULT_ALIGNMENT))
                if alignment < 1:
                    raise ConfigError(f"model.path: {path} is damaged: its general.alignment is {alignment}.", remedy)
                names, end = _tensors(data, at, alignment)
                missing = end - len(data)
        # mmap refuses an empty file with ValueError; struct says when the data ends too early. Numbers that are no
        # sizes overflow, arrays in arrays without end recurse.
        except (struct.error, ValueError, KeyError, ArithmeticError, RecursionError):
            raise ConfigError(f"model.path: {path} is cut short or damaged: its header ends early.", remedy) from None
    if missing > 0:
        raise ConfigError(f"model.path: {path} is cut short: {missing} bytes of its tensors are missing.", remedy)
    scaling = values.get(f"{values.get('general.architecture')}.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in names:
        raise ConfigError(
            f"model.path: {path} scales its rotary positions "
            f"({'rope_freqs.weight' if scaling == 'none' else scaling}), which cannot be read from GGUF.",
            "Give the model's Hugging Face directory.",
        )
    return values


def _entries(data: mmap.mmap) -> tuple[dict[str, Value], int]:
    (count,) = struct.unpack_from("<Q", data, 16)
    values: dict[str, Value] = {}
    at = 24
    for _ in range(count):
        key, at = _string(data, at)
        (kind,) = struct.unpack_from("<I", data, at)
        at += 4
        if kind == _ARRAY:
            (values[f"{key}.length"],) = struct.unpack_from("<Q", data, at + 4)
            at = _after_array(data, at)
        elif kind == _STRING:
            values[key], at = _string(data, at)
        else:
            (values[key],) = struct.unpack_from(_SCALARS[kind], data, at)
            at += struct.calcsize(_SCALARS[kind])
    return values, at


def _tensors(data: mmap.mmap, at: int, alignment: int) -> tuple[set[str], int]:
    """From the tensor table that begins at ``at``: names, and the offset of the first byte after the last tensor."""
    (count,) = struct.unpack_from("<Q", data, 8)
    names, end = set(), 0
    for _ in range(count):
        name, at = _string(data, at)
        names.add(name)
        (dimensions,) = struct.unpack_from("<I", data, at)
        shape = struct.unpack_from(f"<{dimensions}Q", data, at + 4)
        kind, offset = struct.unpack_from("<IQ", data, at + 4 + 8 * dimensions)
        at += 16 + 8 * dimensions
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        end = max(end, offset + prod(shape) // block * size)
    return names, -(-at // alignment) * alignment + end


def _string(data: mmap.mmap, at: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", data, at)
    (raw,) = struct.unpack_from(f"<{length}s", data, at + 8)
    return raw.decode("utf-8", errors="replace"), at + 8 + length


def _after_array(data: mmap.mmap, at: int) -> int:
    kind, count = struct.unpack_from("<IQ", data, at)
    at += 12
    if kind == _ARRAY:
        for _ in range(count):
            at = _after_array(data, at)
        return at
    if kind != _STRING:
        return at + count * struct.calcsize(_SCALARS[kind])
    for _ in range(count):
        at += 8 + struct.unpack_from("<Q", data, at)[0]
    return at
