"""The model owner's public text, split into what stage 1 trains on and what it is measured on."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from scaleot_ray.config import DataSettings, StageOneSettings
from scaleot_ray.data import Batch, TokenBatches, TokenExample, fixed, padding_id, token_examples
from scaleot_ray.data.batches import AlternatingBatches, Batches
from scaleot_ray.emulator.generated_text import generate_text
from scaleot_ray.errors import DataError
from scaleot_ray.families.loading import BaseModel
from scaleot_ray.progress import OnProgress
from scaleot_ray.stages.limits import check_block_size, vocabulary_size
from scaleot_ray.stages.record import read_record, write_record

HELD_OUT = 32
"""Sequences held out at most; with 128 tokens each, a loss over 4,000 tokens."""

_LOOKED_AT = 4096  # the held-out sequences are spread over so many from the start


@dataclass
class PublicText:
    """Batches of public text.

    Attributes:
        batches: to train on, endless.
        held_out: batches of other sequences, all of the same size, for scores and losses.
    """

    batches: Batches
    held_out: list[Batch]


def read_public_text(public: DataSettings, base: BaseModel, settings: StageOneSettings) -> PublicText:
    """Splits public text sequence by sequence.

    One sequence in four at most, and ``HELD_OUT`` at most, evenly spread over the first few thousand,
    are held out; the rest is trained on.

    Raises:
        ConfigError: the blocks are longer than the model's context.
        DataError: the text cannot be read, or gives fewer than two sequences.
    """
    check_block_size(base.model.config, settings.block_size, "stage_one.block_size")
    examples = token_examples(public, base.tokenizer, settings.block_size, too_long="truncate")
    count = sum(1 for _ in itertools.islice(examples, _LOOKED_AT))
    if count < 2:
        raise DataError(
            f"{public.path} gives one sequence of {settings.block_size} tokens; at least two are needed, "
            "one to train on and one to measure on.",
            "Give more public text, or lower stage_one.block_size.",
        )
    wanted = max(1, min(HELD_OUT, count // 4))
    size = min(settings.batch_size, wanted)
    wanted -= wanted % size
    held_out = frozenset((2 * place + 1) * count // (2 * wanted) for place in range(wanted))
    pad, vocabulary = padding_id(base.tokenizer), vocabulary_size(base.model)
    return PublicText(
        TokenBatches(
            _Part(examples, held_out, inside=False), settings.batch_size, pad, settings.seed, vocab_size=vocabulary
        ),
        list(fixed(_Part(examples, held_out, inside=True), size, pad, wanted, vocabulary)),
    )


def generated_sequences(
    base: BaseModel, settings: StageOneSettings, folder: Path | None = None, on_progress: OnProgress | None = None
) -> list[list[int]]:
    """Text that the model generates itself, as token ids.

    Args:
        folder: where it is kept; it is generated once for the same model and settings.
        on_progress: hears of ``generate text``.

    Raises:
        RunFailed: the model's output is not finite.
        ResourcesMissing, ConfigError: the text cannot be kept.
    """
    file = None if folder is None else folder / "generated_text.json"
    sequences: list[list[int]] | None = read_record(file).get("input_ids") if file is not None else None
    if sequences is None:
        count, size = settings.generated_tokens, settings.block_size
        sequences = generate_text(base.model, base.tokenizer, count, size, settings.seed, on_progress).tolist()
        if file is not None:
            write_record(file, {"input_ids": sequences})
    return sequences


def mixed_with(
    text: PublicText, sequences: Sequence[Sequence[int]], base: BaseModel, settings: StageOneSettings
) -> PublicText:
    """The same with every second batch of other sequences; what is held out stays."""
    examples = [TokenExample(list(tokens), list(tokens)) for tokens in sequences]
    generated = TokenBatches(examples, settings.batch_size, padding_id(base.tokenizer), settings.seed)
    return PublicText(AlternatingBatches(text.batches, generated), text.held_out)


class _Part(Iterable[TokenExample]):
    """The examples whose index is among ``chosen``, or the others; may be iterated any number of times."""

    def __init__(self, examples: Iterable[TokenExample], chosen: frozenset[int], inside: bool) -> None:
        self._examples, self._chosen, self._inside = examples, chosen, inside

    def __iter__(self) -> Iterator[TokenExample]:
        for index, example in enumerate(self._examples):
            if self._inside and index > max(self._chosen):
                return
            if (index in self._chosen) is self._inside:
                yield example
