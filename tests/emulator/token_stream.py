"""Random token batches for stage 1 on tiny models, resumable as TokenBatches is."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tests.tiny_models import tiny_tokens


class RandomTokens:
    """Endless batches of random tokens; batch i is the same whatever the start."""

    def __init__(self, batch: int = 4, time: int = 16) -> None:
        self.batch, self.time = batch, time

    def batches(self, start: int = 0) -> Iterator[dict[str, torch.Tensor]]:
        index = start
        while True:
            tokens = tiny_tokens(self.batch, self.time, seed=1000 + index)
            yield {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
            index += 1

    def fixed(self, count: int) -> list[dict[str, torch.Tensor]]:
        """The first ``count`` batches of another stream."""
        stream = self.batches(10_000)
        return [next(stream) for _ in range(count)]
