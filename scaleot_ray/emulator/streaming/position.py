"""Where a pass through a model's layers was when it stopped, on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from scaleot_ray.checkpoints import CheckpointPace, read_state, write_state
from scaleot_ray.errors import NO_ROOM, ResourcesMissing, RunFailed

_EVERY = 1 << 30  # layers; the minute decides


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Says in words what keeps a file of the cache from being written.

    Raises:
        ResourcesMissing: the disk is full.
        RunFailed: it cannot be written for another reason.
    """
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise ResourcesMissing(
                f"{path}: no room to write ({error}).",
                "Free disk space and run the same command again; it goes on from what was written before.",
            ) from error
        raise RunFailed(f"{path}: cannot be written ({error}).", "Give a cache folder that can be.") from error


class Position:
    """The state of a pass between two layers; at most a minute of work is lost.

    Args:
        path: of the file; None keeps nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._pace = CheckpointPace(_EVERY)

    def passed(
        self, index: int, tensors: Callable[[], dict[str, torch.Tensor]], record: dict[str, Any], due: bool = False
    ) -> None:
        """All layers in front of ``index`` are done; their outcome is written if a minute has passed, or if it is due.

        Raises:
            ResourcesMissing: the disk is full.
            RunFailed: the file cannot be written for another reason.
        """
        if self.path is None or not (due or self._pace.due(index)):
            return
        path, text = self.path, json.dumps({"index": index, **record})
        with writing(path):
            self._pace.write(lambda: write_state(path, tensors(), "position", text))

    def restore(self) -> tuple[int, dict[str, torch.Tensor], dict[str, Any]] | None:
        """Index, tensors and record of :meth:`passed`; None where nothing is kept.

        Raises:
            RunFailed: the file is damaged.
        """
        if self.path is None or not self.path.exists():
            return None
        try:
            tensors, text = read_state(self.path, "position")
            record = json.loads(text)
            # In memory of their own: products of matrices that lie in a file's odd places differ in the last bit.
            return int(record.pop("index")), {name: tensor.clone() for name, tensor in tensors.items()}, record
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise RunFailed(
                f"{self.path}: is no readable state of a pass ({error}).", "Delete it; the pass starts afresh."
            ) from error
