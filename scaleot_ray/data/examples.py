"""Rows → token ids with labels, by task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from scaleot_ray.config import DataSettings
from scaleot_ray.data.chat import chat_tokens, check_template, read_messages
from scaleot_ray.data.choice import read_choices
from scaleot_ray.data.encoding import Encoder
from scaleot_ray.data.rows import Row, Rows, open_rows
from scaleot_ray.data.template import PromptTemplate
from scaleot_ray.errors import DataError

IGNORED = -100
TooLong = Literal["error", "truncate"]
Example = TypeVar("Example")


@dataclass
class TokenExample:
    """One sequence to learn from.

    Attributes:
        input_ids: token ids, at most block_size of them.
        labels: the same, -100 where no loss falls; the model shifts them.
    """

    input_ids: list[int]
    labels: list[int]


@dataclass
class ChoiceExample:
    """One question with several answers.

    Attributes:
        context: token ids of the prompt, at least one.
        continuations: token ids of each answer as it follows the prompt.
        label: index of the right answer.
        lengths: characters of each answer, for the length-normalised accuracy.
    """

    context: list[int]
    continuations: list[list[int]]
    label: int
    lengths: list[int]


class Examples(Iterable[Example], Generic[Example]):
    """Examples made from rows as they are read; may be iterated any number of times."""

    def __init__(self, rows: Rows, make: Callable[[Iterable[Row]], Iterator[Example]]) -> None:
        self._rows, self._make = rows, make

    def __iter__(self) -> Iterator[Example]:
        return self._make(self._rows)


def token_examples(
    settings: DataSettings,
    tokenizer: Any,
    block_size: int,
    too_long: TooLong = "error",
    part: Callable[[Rows], Rows] | None = None,
) -> Examples[TokenExample]:
    """A dataset as sequences of at most ``block_size`` tokens.

    - text: documents joined by EOS, cut into blocks of exactly ``block_size``; every token counts.
      The last, shorter block is left out unless it is the only one.
    - completion: prompt and completion as one text, EOS; loss on every token that the completion is in, and EOS.
    - choice: prompt and right answer, the same tokens as :func:`choice_examples` scores; loss on the answer.
    - chat: the tokenizer's template; loss on the assistant's turns.

    The first example is made at once, so that mistakes in the settings show early.

    Args:
        settings: the dataset.
        tokenizer: a Hugging Face tokenizer.
        block_size: tokens per sequence.
        too_long: what to do with longer rows of the last three tasks: stop, or cut the prompt's start (after BOS).
            A choice row has to have room for its longest answer, as when it is scored.
        part: takes some of the rows, e.g. :meth:`scaleot_ray.data.holdout.HoldOut.training`; default: all.

    Raises:
        DataError: here or while iterating: the dataset cannot be read, a row is not what the settings
            say, is longer than the block, or has nothing to learn.
    """
    encoder = Encoder(tokenizer)
    if settings.task == "chat":
        check_template(tokenizer)
    prompt = _prompt(settings)

    def blocks(rows: Iterable[Row]) -> Iterator[TokenExample]:
        return _blocks(rows, settings, encoder, block_size)

    def sequences(rows: Iterable[Row]) -> Iterator[TokenExample]:
        for row in rows:
            ids, labels = _sequence(row, settings, encoder, prompt)
            yield _fit(ids, labels, encoder.prefix, block_size, too_long, row.where)

    def answers(rows: Iterable[Row]) -> Iterator[TokenExample]:
        for row in rows:
            question = _question(row, settings, encoder, prompt, block_size, too_long)
            answer = question.continuations[question.label]
            yield TokenExample(question.context + answer, [IGNORED] * len(question.context) + answer)

    make = {"text": blocks, "choice": answers}.get(settings.task, sequences)
    return _started(Examples(_rows(settings, part), make))


def choice_examples(
    settings: DataSettings,
    tokenizer: Any,
    block_size: int,
    too_long: TooLong = "error",
    part: Callable[[Rows], Rows] | None = None,
) -> Examples[ChoiceExample]:
    """A multiple-choice dataset for :func:`scaleot_ray.evaluation.choice.evaluate_choice`.

    An answer follows the prompt after a space, unless the prompt ends with white space already.

    Args:
        settings: the dataset; its task is ``choice``.
        tokenizer: a Hugging Face tokenizer.
        block_size: tokens of the prompt and the longest answer together.
        too_long: what to do with longer rows: stop, or cut the prompt's start (after BOS).
        part: takes some of the rows; default: all.

    Raises:
        DataError: as :func:`token_examples`.
        ValueError: the task is not ``choice``.
    """
    if settings.task != "choice":
        raise ValueError(f"choice_examples needs task choice, not {settings.task}")
    encoder = Encoder(tokenizer)
    prompt = _prompt(settings)

    def questions(rows: Iterable[Row]) -> Iterator[ChoiceExample]:
        for row in rows:
            yield _question(row, settings, encoder, prompt, block_size, too_long)

    return _started(Examples(_rows(settings, part), questions))


def _rows(settings: DataSettings, part: Callable[[Rows], Rows] | None) -> Rows:
    rows = open_rows(settings)
    return rows if part is None else part(rows)


def _started(examples: Examples[Example]) -> Examples[Example]:
    next(iter(examples))
    return examples


def _prompt(settings: DataSettings) -> Callable[[Row], str]:
    if settings.prompt_template is not None:
        return PromptTemplate(settings.prompt_template).fill
    return lambda row: row.text(settings.prompt_column, "prompt_column (or prompt_template)")


def _sequence(
    row: Row, settings: DataSettings, encoder: Encoder, prompt: Callable[[Row], str]
) -> tuple[list[int], list[int]]:
    if settings.task == "chat":
        ids, learned = chat_tokens(encoder, read_messages(row, settings.messages_column), row.where)
        return ids, _labels(ids, learned)
    completion = row.text(settings.completion_column, "completion_column")
    if not completion:
        raise DataError(
            f"{row.where}: column {settings.completion_column!r} is empty, so there is nothing to learn.",
            "Fill it or remove the row.",
        )
    ids, learned = encoder.joined(prompt(row), completion)
    if not any(learned):
        raise DataError(
            f"{row.where}: column {settings.completion_column!r} has no token of its own after the prompt.",
            "Write the completion as text that the tokenizer keeps, or remove the row.",
        )
    return [*ids, encoder.eos], [*_labels(ids, learned), encoder.eos]


def _labels(ids: list[int], learned: list[bool]) -> list[int]:
    return [token if counts else IGNORED for token, counts in zip(ids, learned, strict=True)]


def _question(
    row: Row,
    settings: DataSettings,
    encoder: Encoder,
    prompt: Callable[[Row], str],
    block_size: int,
    too_long: TooLong,
) -> ChoiceExample:
    choices, text = read_choices(row, settings), prompt(row)
    delimiter = "" if text[-1:].isspace() else " "
    context, continuations = encoder.pairs(text, [delimiter + answer for answer in choices.texts])
    if not all(continuations):
        raise DataError(
            f"{row.where}: a choice has no token of its own after the prompt.", "Write every choice as text."
        )
    longest = max(map(len, continuations))
    if len(context) + longest > block_size:
        _refuse_too_long(len(context) + longest, too_long, row.where, block_size)
        kept = block_size - longest - len(encoder.prefix)
        if kept < 1:
            raise _answer_too_long(longest, row.where, block_size)
        context = encoder.prefix + context[-kept:]
    return ChoiceExample(context, continuations, choices.label, [len(answer) for answer in choices.texts])


def _refuse_too_long(tokens: int, too_long: TooLong, where: str, block_size: int) -> None:
    if too_long == "error":
        raise DataError(
            f"{where}: prompt and answer have {tokens} tokens, block_size is {block_size}.",
            "Raise block_size, shorten the row, or set too_long to truncate to cut the start.",
        )


def _answer_too_long(tokens: int, where: str, block_size: int) -> DataError:
    return DataError(
        f"{where}: the answer alone has {tokens} tokens, which leaves no room for the prompt "
        f"(block_size is {block_size}).",
        "Raise block_size or shorten the row.",
    )


def _ending(ids: list[int], labels: list[int], room: int, where: str, block_size: int) -> tuple[list[int], list[int]]:
    """The last ``room`` tokens up to the end of the last answer; an answer cut at its start is not learned."""
    end = max((index + 1 for index, label in enumerate(labels) if label != IGNORED), default=len(ids))
    start = max(0, end - room)
    kept, learned = ids[start:end], labels[start:end]
    if start and learned[0] != IGNORED:
        cut = next((index for index, label in enumerate(learned) if label == IGNORED), len(learned))
        learned[:cut] = [IGNORED] * cut
        if all(label == IGNORED for label in learned):
            begin = max((index + 1 for index in range(start) if labels[index] == IGNORED), default=0)
            raise _answer_too_long(end - begin, where, block_size)
    return kept, learned


def _fit(
    ids: list[int], labels: list[int], prefix: list[int], block_size: int, too_long: TooLong, where: str
) -> TokenExample:
    if len(ids) > block_size:
        _refuse_too_long(len(ids), too_long, where, block_size)
        # What every sequence starts with stays; the prompt is cut after it.
        first = len(prefix) if ids[: len(prefix)] == prefix else 0
        kept, learned = _ending(ids[first:], labels[first:], block_size - first, where, block_size)
        ids, labels = ids[:first] + kept, labels[:first] + learned
    if all(label == IGNORED for label in labels[1:]):
        raise DataError(f"{where}: no token counts for the loss.", "Fill the row's answer, or remove the row.")
    return TokenExample(ids, labels)


def _blocks(rows: Iterable[Row], settings: DataSettings, encoder: Encoder, block_size: int) -> Iterator[TokenExample]:
    waiting: list[int] = []
    fresh, any_block = True, False
    for row in rows:
        text = row.text(settings.text_column, "text_column")
        if fresh and not text.strip():
            continue
        waiting += encoder.text(text) if fresh else encoder.plain(text)
        fresh = not row.unfinished
        if fresh:
            waiting.append(encoder.eos)
        whole = len(waiting) - len(waiting) % block_size
        for start in range(0, whole, block_size):
            any_block = True
            yield TokenExample(waiting[start : start + block_size], waiting[start : start + block_size])
        del waiting[:whole]
    if not any_block:
        if len(waiting) < 2:
            raise DataError(
                f"{settings.path}: column {settings.text_column!r} holds no text.", "Give a dataset with text in it."
            )
        yield TokenExample(waiting, list(waiting))
