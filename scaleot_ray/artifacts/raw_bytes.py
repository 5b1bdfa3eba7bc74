"""A tensor's raw bytes, without a copy, and their fingerprint.

Raw bytes are the row-major, little-endian values, as the safetensors format stores them. numpy has no
bfloat16, so those tensors are seen through uint16.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import numpy.typing as npt
import torch

DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "uint8": torch.uint8,
}
"""The types an artefact's tensors may have, by their names in a manifest."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# Hash and finite check go through a tensor together, so that each piece is read from memory once and
# the check's temporaries stay small beside a large embedding.
_CHUNK = 1 << 18


def dtype_name(dtype: torch.dtype) -> str | None:
    """The manifest's name of ``dtype``; None for a type that artefacts do not carry."""
    return _NAMES.get(dtype)


def raw_bytes(tensor: torch.Tensor) -> npt.NDArray[np.uint8]:
    """The bytes of a contiguous CPU tensor as a one-dimensional uint8 view that shares its memory."""
    flat = tensor.detach().view(-1)
    if flat.dtype == torch.bfloat16:
        flat = flat.view(torch.uint16)
    return flat.numpy().view(np.uint8)


def fingerprint(tensor: torch.Tensor) -> tuple[str, bool]:
    """SHA-256 (hex) of a contiguous CPU tensor's raw bytes, and whether all its values are finite."""
    values, data = tensor.detach().view(-1), raw_bytes(tensor)
    digest, finite, size = hashlib.sha256(), True, tensor.element_size()
    for start in range(0, values.numel(), _CHUNK):
        digest.update(data[start * size : (start + _CHUNK) * size].data)
        if finite and values.is_floating_point():
            # The extremes of a piece are finite exactly when all of it is (aminmax hands NaN on); an
            # order of magnitude faster than isfinite on every value.
            low, high = torch.aminmax(values[start : start + _CHUNK])
            finite = math.isfinite(low.item()) and math.isfinite(high.item())
    return digest.hexdigest(), finite
