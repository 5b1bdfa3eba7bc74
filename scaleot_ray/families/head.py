"""The output head of a causal LM, run on chosen positions and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class HeadPositions:
    """Hands the head only the hidden states of chosen positions.

    They are picked by a hook in front of the head, so that everything a model does after its head
    (Gemma's soft cap) stays its own business. With a vocabulary of 49k and few positions that matter,
    this saves most of the head's time and memory.

    Args:
        model: a Hugging Face causal LM; carries the hook until :meth:`close`.
    """

    def __init__(self, model: Any) -> None:
        self._chosen: torch.Tensor | None = None
        self._hook = model.get_output_embeddings().register_forward_pre_hook(self._pick)

    @contextmanager
    def at(self, positions: torch.Tensor) -> Iterator[None]:
        """Within, logits are (1, N, vocabulary) for ``positions`` (N,) into (batch, time) taken as one row."""
        self._chosen = positions
        try:
            yield
        finally:
            self._chosen = None

    def close(self) -> None:
        """Takes the hook off the model."""
        self._hook.remove()

    def _pick(self, _head: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        if self._chosen is None:
            return None
        return (inputs[0].flatten(0, 1).index_select(0, self._chosen).unsqueeze(0), *inputs[1:])
