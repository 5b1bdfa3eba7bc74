"""Counts the bytes of tensors that are alive, whatever makes them and wherever they lie."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensor storages that come into being inside, for as long as each lives; a context manager.

    It counts what PyTorch allocates for tensors, also where nothing is allocated because they are fake; tensors on the
    meta device do not count. What an operation uses for itself while it runs does not show.

    Attributes:
        live: bytes that are alive now.
        peak: the most that were alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = {
            id(value.untyped_storage()) for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and not value.is_meta:
                storage = value.untyped_storage()
                if id(storage) not in before:
                    self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.live -= size


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes that tensors made by ``work`` take at once."""
    with LiveBytes() as counted:
        work()
    return counted.peak
