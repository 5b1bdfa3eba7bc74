"""Examples → padded batches: shuffled endlessly for training, or once in order for evaluation."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from scaleot_ray.data.encoding import check_vocabulary
from scaleot_ray.data.examples import IGNORED, TokenExample
from scaleot_ray.errors import DataError

Batch = dict[str, Tensor]


def padding_id(tokenizer: Any) -> int:
    """The token id that fills up short sequences (masked out everywhere, so EOS serves as well)."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


class TokenBatches:
    """Endless shuffled batches, the same for the same examples and seed.

    Every epoch has an order of its own. Up to ``shuffle_buffer`` examples are held in memory: a
    dataset that fits is read once and shuffled as a whole; a larger one streams through the buffer,
    each example drawn at random from what it holds. Batches always have ``batch_size`` sequences and
    run across epoch ends, so a dataset may be smaller than a batch.

    Args:
        examples: re-iterable.
        batch_size: sequences per batch.
        pad_id: fills up the right of shorter sequences.
        seed: of the shuffling.
        shuffle: False keeps the order of the examples.
        shuffle_buffer: examples held in memory.
        vocab_size: tokens the model knows; ids beyond are refused.
    """

    def __init__(
        self,
        examples: Iterable[TokenExample],
        batch_size: int,
        pad_id: int,
        seed: int,
        shuffle: bool = True,
        shuffle_buffer: int = 10_000,
        vocab_size: int | None = None,
    ) -> None:
        self.batch_size, self.pad_id, self.seed, self.vocab_size = batch_size, pad_id, seed, vocab_size
        self._examples, self._shuffle, self._buffer = examples, shuffle, shuffle_buffer
        self._held: list[TokenExample] | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Batches from index ``start`` on: the same ones that follow when the first ``start`` are drawn.

        Raises:
            DataError: while iterating: the examples cannot be made, there is none, or a token id is
                beyond the vocabulary.
        """
        stream = itertools.islice(self._stream(), start * self.batch_size, None)
        while True:
            yield collate(list(itertools.islice(stream, self.batch_size)), self.pad_id, self.vocab_size)

    def _stream(self) -> Iterator[TokenExample]:
        for epoch in itertools.count():
            order = random.Random(f"{self.seed} {epoch}")
            if self._held is None:
                yield from self._read(order)
            else:
                yield from self._shuffled(self._held, order)

    def _read(self, order: random.Random) -> Iterator[TokenExample]:
        source = iter(self._examples)
        held = list(itertools.islice(source, self._buffer))
        if not held:
            raise DataError("The dataset gives no example to train on.", "Give a dataset with at least one row.")
        following = next(source, None)
        if following is None:
            self._held = held
            yield from self._shuffled(held, order)
            return
        for example in itertools.chain([following], source):
            place = order.randrange(len(held)) if self._shuffle else 0
            if not self._shuffle:
                yield from held
                held = [example]
                continue
            yield held[place]
            held[place] = example
        yield from self._shuffled(held, order)

    def _shuffled(self, examples: Sequence[TokenExample], order: random.Random) -> Iterator[TokenExample]:
        indices = list(range(len(examples)))
        if self._shuffle:
            order.shuffle(indices)
        return (examples[index] for index in indices)


def fixed(
    examples: Iterable[TokenExample],
    batch_size: int,
    pad_id: int,
    limit: int | None = None,
    vocab_size: int | None = None,
) -> Iterator[Batch]:
    """One pass in order over the first ``limit`` examples; the last batch may be smaller.

    Raises:
        DataError: the examples cannot be made, or a token id is beyond the vocabulary.
    """
    source = itertools.islice(examples, limit)
    while chunk := list(itertools.islice(source, batch_size)):
        yield collate(chunk, pad_id, vocab_size)


def collate(examples: Sequence[TokenExample], pad_id: int, vocab_size: int | None = None) -> Batch:
    """Sequences side by side, filled up on the right: input_ids, attention_mask, labels, each (batch, time) int64.

    Raises:
        DataError: a token id is not below ``vocab_size``.
    """
    for example in examples:
        check_vocabulary(example.input_ids, vocab_size)
    time = max(len(example.input_ids) for example in examples)
    ids = torch.full((len(examples), time), pad_id, dtype=torch.int64)
    labels = torch.full((len(examples), time), IGNORED, dtype=torch.int64)
    mask = torch.zeros((len(examples), time), dtype=torch.int64)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        ids[row, :length] = torch.tensor(example.input_ids, dtype=torch.int64)
        labels[row, :length] = torch.tensor(example.labels, dtype=torch.int64)
        mask[row, :length] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
