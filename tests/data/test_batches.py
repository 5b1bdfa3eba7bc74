"""Batches: reproducible, resumable at any index, endless, right with the fewest and with the most examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice

import pytest
import torch

from scaleot_ray.data import Batch, TokenBatches, TokenExample, fixed, padding_id
from scaleot_ray.data.batches import AlternatingBatches
from scaleot_ray.errors import DataError
from tests.data.small_tokenizer import small_tokenizer


class Counted:
    """Examples 0 … count−1, of lengths 1 to 4; counts how often they are read from the start."""

    def __init__(self, count: int) -> None:
        self.count, self.passes = count, 0

    def __iter__(self) -> Iterator[TokenExample]:
        self.passes += 1
        for number in range(self.count):
            ids = [number + 1] * (number % 4 + 1)
            yield TokenExample(ids, [-100, *ids[1:]])


def first(batches: TokenBatches, count: int, start: int = 0) -> list[Batch]:
    return list(islice(batches.batches(start), count))


def same(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        all(torch.equal(left[key], right[key]) for key in left) for left, right in zip(one, other, strict=True)
    )


def numbers(batches: list[Batch]) -> list[int]:
    return [int(number) - 1 for batch in batches for number in batch["input_ids"][:, 0]]


class Faulty(Counted):
    """The same, but that one example cannot be made."""

    def __init__(self, count: int, fault: int) -> None:
        super().__init__(count)
        self.fault = fault

    def __iter__(self) -> Iterator[TokenExample]:
        for number, example in enumerate(super().__iter__()):
            if number == self.fault:
                raise DataError(f"row {number} is broken.", "Mend it.")
            yield example


BUFFERS = [100, 4]  # the dataset fits; it streams through a small buffer


@pytest.mark.parametrize("buffer", BUFFERS)
def test_reproducible_and_resumable_anywhere(buffer: int) -> None:
    def made(seed: int = 3) -> TokenBatches:
        return TokenBatches(Counted(10), 4, 0, seed, shuffle_buffer=buffer)

    expected = first(made(), 12)
    once = made()
    for start in range(12):
        assert same(first(made(), 12 - start, start), expected[start:])
        assert same(first(once, 12 - start, start), expected[start:]), "also after other passes over the same object"
    assert not same(first(made(seed=4), 12), expected)
    assert same(list(islice(made(), 12)), expected)


@pytest.mark.parametrize("buffer", BUFFERS)
def test_batches_of_earlier_rounds_are_passed_over(buffer: int) -> None:
    expected = first(TokenBatches(Counted(10), 4, 0, 3, shuffle_buffer=buffer), 9)
    later = TokenBatches(Counted(10), 4, 0, 3, shuffle_buffer=buffer, passed=4)
    later.prepare(2)
    assert same(first(later, 5), expected[4:])
    assert same(first(later, 3, 2), expected[6:])


@pytest.mark.parametrize("buffer", BUFFERS)
def test_every_epoch_has_each_example_once_in_its_own_order(buffer: int) -> None:
    seen = numbers(first(TokenBatches(Counted(10), 5, 0, seed=0, shuffle_buffer=buffer), 6))
    epochs = [seen[start : start + 10] for start in range(0, 30, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_a_dataset_that_fits_is_read_once() -> None:
    examples = Counted(10)
    first(TokenBatches(examples, 4, 0, seed=0), 20)
    assert examples.passes == 1
    first(TokenBatches(examples, 4, 0, seed=0, shuffle_buffer=10), 20)
    assert examples.passes == 2
    first(TokenBatches(examples, 4, 0, seed=0, shuffle_buffer=9), 20)
    assert examples.passes == 10


def test_a_large_dataset_streams_through_the_buffer() -> None:
    taken = 0

    def endless() -> Iterator[TokenExample]:
        nonlocal taken
        while True:
            taken += 1
            yield TokenExample([taken, taken], [taken, taken])

    seen = numbers(first(TokenBatches(endless(), 4, 0, seed=0, shuffle_buffer=50), 25))
    assert taken <= 50 + 100 + 1
    assert seen != sorted(seen)
    assert all(number <= 50 + place for place, number in enumerate(seen))


def test_fewer_examples_than_a_batch() -> None:
    batches = first(TokenBatches(Counted(2), 8, 0, seed=0), 3)
    assert all(len(batch["input_ids"]) == 8 for batch in batches)
    assert Counter(numbers(batches)) == {0: 12, 1: 12}


def test_padding() -> None:
    (batch,) = fixed([TokenExample([5, 6, 7], [-100, 6, 7]), TokenExample([8], [8])], 2, pad_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_fixed_is_one_pass_in_order() -> None:
    assert numbers(list(fixed(Counted(10), 4, 0))) == list(range(10))
    assert [len(batch["labels"]) for batch in fixed(Counted(10), 4, 0)] == [4, 4, 2]
    assert numbers(list(fixed(Counted(10), 4, 0, limit=5))) == list(range(5))


def test_token_ids_beyond_the_vocabulary() -> None:
    assert first(TokenBatches(Counted(10), 4, 0, seed=0, vocab_size=11), 3)
    with pytest.raises(DataError, match="token id 10, but the model has 10 tokens"):
        first(TokenBatches(Counted(10), 4, 0, seed=0, vocab_size=10), 3)
    with pytest.raises(DataError, match="do not match"):
        list(fixed(Counted(10), 4, 0, vocab_size=10))


def test_no_example_at_all() -> None:
    with pytest.raises(DataError, match="no example to train on"):
        first(TokenBatches(Counted(0), 4, 0, seed=0), 1)


def test_padding_id() -> None:
    tokenizer = small_tokenizer.__wrapped__()
    assert padding_id(tokenizer) == tokenizer.pad_token_id
    tokenizer.pad_token = None
    assert padding_id(tokenizer) == tokenizer.eos_token_id


@pytest.mark.parametrize("buffer", BUFFERS)
def test_preparing_changes_no_batch(buffer: int) -> None:
    def made() -> TokenBatches:
        return TokenBatches(Counted(10), 4, 0, 3, shuffle_buffer=buffer)

    for count in (0, 1, 2, 9):
        prepared = made()
        prepared.prepare(count)
        assert same(first(prepared, 12), first(made(), 12))


def test_a_faulty_example_shows_before_it_is_needed() -> None:
    # The first three batches of two draw from 4 + 6 examples.
    batches = TokenBatches(Faulty(20, fault=9), 2, 0, 3, shuffle_buffer=4)
    batches.prepare(2)
    assert len(first(batches, 2)) == 2
    with pytest.raises(DataError, match="row 9 is broken"):
        batches.prepare(3)
    with pytest.raises(DataError, match="no example to train on"):
        TokenBatches(Counted(0), 2, 0, 3).prepare(1)


def test_what_fits_is_made_once() -> None:
    examples = Counted(10)
    batches = TokenBatches(examples, 4, 0, 3)
    batches.prepare(5)
    first(batches, 12)
    assert examples.passes == 1


def test_sources_take_turns_from_any_start() -> None:
    sources = [TokenBatches(Counted(count), 2, 0, seed) for count, seed in ((5, 1), (7, 2), (3, 3))]
    mixed = list(islice(AlternatingBatches(*sources).batches(), 12))
    for place, source in enumerate(sources):
        assert same(mixed[place::3], first(source, 4))
    for start in range(1, 8):
        assert same(list(islice(AlternatingBatches(*sources).batches(start), 12 - start)), mixed[start:])
