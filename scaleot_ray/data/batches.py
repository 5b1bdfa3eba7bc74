"""Examples → padded batches: shuffled endlessly for training, or once in order for evaluation."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from scaleot_ray.data.encoding import check_vocabulary
from scaleot_ray.data.examples import IGNORED, TokenExample
from scaleot_ray.errors import DataError

Batch = dict[str, Tensor]
_Packed = tuple[Tensor, Tensor]  # token ids and labels of one sequence, int32


class Batches(Protocol):
    """Endless reproducible batches that can begin at any of them."""

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """``input_ids``, ``attention_mask``, ``labels``, each (batch, time), from batch ``start`` on."""
        ...


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
        shuffle_buffer: examples held in memory.
        vocab_size: tokens the model knows; ids beyond are refused.
        passed: batches that have been gone through before, in earlier rounds; it begins behind them.
    """

    def __init__(
        self,
        examples: Iterable[TokenExample],
        batch_size: int,
        pad_id: int,
        seed: int,
        shuffle_buffer: int = 10_000,
        vocab_size: int | None = None,
        passed: int = 0,
    ) -> None:
        self.passed = passed
        self.batch_size, self.pad_id, self.seed, self.vocab_size = batch_size, pad_id, seed, vocab_size
        self._examples, self._buffer = examples, shuffle_buffer
        self._held: list[_Packed] | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Batches from index ``start`` on: the same ones that follow when the first ``start`` are drawn.

        Raises:
            DataError: while iterating: the examples cannot be made, there is none, or a token id is
                beyond the vocabulary.
        """
        stream = itertools.islice(self._stream(), (self.passed + start) * self.batch_size, None)
        while True:
            yield _side_by_side(list(itertools.islice(stream, self.batch_size)), self.pad_id)

    def prepare(self, batches: int) -> None:
        """Makes all examples that the first ``batches`` will need, so that a faulty row shows before work begins.

        Raises:
            DataError: as :meth:`batches` does.
        """
        held, source = self._begin()
        more = sum(1 for _ in itertools.islice(source, (self.passed + batches) * self.batch_size))
        if not more and next(source, None) is None:
            self._held = held

    def _stream(self) -> Iterator[_Packed]:
        for epoch in itertools.count():
            order = random.Random(f"{self.seed} {epoch}")
            yield from self._read(order) if self._held is None else self._shuffled(self._held, order)

    def _read(self, order: random.Random) -> Iterator[_Packed]:
        held, source = self._begin()
        following = next(source, None)
        if following is None:
            self._held = held
        else:
            for example in itertools.chain([following], source):
                place = order.randrange(len(held))
                yield held[place]
                held[place] = example
        yield from self._shuffled(held, order)

    def _begin(self) -> tuple[list[_Packed], Iterator[_Packed]]:
        """What fits into the buffer, and the examples after that."""
        source = (_pack(example, self.vocab_size) for example in self._examples)
        held = list(itertools.islice(source, self._buffer))
        if not held:
            raise DataError("The dataset gives no example to train on.", "Give a dataset with at least one row.")
        return held, source

    def _shuffled(self, held: Sequence[_Packed], order: random.Random) -> Iterator[_Packed]:
        indices = list(range(len(held)))
        order.shuffle(indices)
        return (held[index] for index in indices)


class AlternatingBatches:
    """Batches of several endless sources in turn.

    Args:
        sources: e.g. :class:`TokenBatches`.
    """

    def __init__(self, *sources: Batches) -> None:
        self._sources = sources

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Batches from index ``start`` on: the same ones that follow when the first ``start`` are drawn."""
        number = len(self._sources)
        rounds, ahead = divmod(start, number)
        streams = [source.batches(rounds + (place < ahead)) for place, source in enumerate(self._sources)]
        for index in itertools.count(start):
            yield next(streams[index % number])


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
    return _side_by_side([_pack(example, vocab_size) for example in examples], pad_id)


def stacked(batches: Sequence[Batch]) -> Batch:
    """The rows of several batches one below the other, filled up on the right to the longest; one stays as it is.

    What fills up is masked out and has no label, so that no row's loss depends on the others.
    """
    if len(batches) == 1:
        return batches[0]
    time = max(batch["input_ids"].shape[1] for batch in batches)
    whole = [{"attention_mask": torch.ones_like(batch["input_ids"]), **batch} for batch in batches]
    fillers = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
    return {name: torch.cat([_filled(batch[name], time, value) for batch in whole]) for name, value in fillers.items()}


def _filled(values: Tensor, time: int, value: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, time - values.shape[1]), value=value)


def _pack(example: TokenExample, vocab_size: int | None) -> _Packed:
    check_vocabulary(example.input_ids, vocab_size)
    # A list of Python integers takes five times as much, and thousands of examples wait in the buffer.
    return torch.tensor(example.input_ids, dtype=torch.int32), torch.tensor(example.labels, dtype=torch.int32)


def _side_by_side(sequences: Sequence[_Packed], pad_id: int) -> Batch:
    shape = len(sequences), max(len(ids) for ids, _ in sequences)
    batch = {
        "input_ids": torch.full(shape, pad_id, dtype=torch.int64),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
        "labels": torch.full(shape, IGNORED, dtype=torch.int64),
    }
    for row, (ids, labels) in enumerate(sequences):
        batch["input_ids"][row, : len(ids)] = ids
        batch["attention_mask"][row, : len(ids)] = 1
        batch["labels"][row, : len(ids)] = labels
    return batch
