"""Finished layers of an emulator in files of their own, mapped again as soon as they are written."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError

from scaleot_ray.checkpoints import read_state, write_state
from scaleot_ray.emulator.streaming.position import writing
from scaleot_ray.errors import RunFailed


class SavedLayers:
    """The fitted parameters of an emulator, layer by layer.

    Args:
        folder: where they are kept; None keeps them in memory.

    Attributes:
        tensors: all that were kept or restored, by their names in the emulator.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.tensors: dict[str, torch.Tensor] = {}

    def keep(self, index: int, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The same tensors as pages of the layer's file.

        Raises:
            ResourcesMissing: the disk is full.
            RunFailed: the file cannot be written for another reason.
        """
        if self.folder is None:
            self.tensors |= tensors
            return tensors
        path = self._path(index)
        with writing(path):
            write_state(path, tensors, "layer", str(index))
        return self.restore(index)

    def restore(self, index: int) -> dict[str, torch.Tensor]:
        """What was kept of a layer.

        Raises:
            RunFailed: its file is missing or damaged.
        """
        path = self._path(index)
        try:
            tensors, _ = read_state(path, "layer")
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise RunFailed(
                f"{path}: holds no readable layer ({error}).", f"Delete {path.parent}; the fit starts afresh."
            ) from error
        self.tensors |= tensors
        return tensors

    def _path(self, index: int) -> Path:
        assert self.folder is not None
        return self.folder / f"layer-{index:03d}.safetensors"
