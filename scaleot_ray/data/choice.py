"""Multiple choice: a row's prompt, its answers, and which of them is right."""

from __future__ import annotations

import re
import string
from dataclasses import dataclass
from typing import Any

from scaleot_ray.config import DataSettings
from scaleot_ray.data.rows import Row, short
from scaleot_ray.errors import DataError


@dataclass
class Choices:
    """The answers of one row.

    Attributes:
        texts: the answers, at least two.
        label: index of the right one.
    """

    texts: list[str]
    label: int


def read_choices(row: Row, settings: DataSettings) -> Choices:
    """The answers of ``row``: ``settings.choices`` for all rows, or a column with a list of texts or with
    ``{"text": [...], "label": [...]}``. The label is an answer's name, its text, its letter or its index from 0.

    Raises:
        DataError: a column is missing or of the wrong type, there are fewer than two answers, one is empty, the
            right one is there twice, not every one has a name of its own, or the label is none or could be two of
            them.
    """
    texts, names = _answers(row, settings)
    if len(texts) < 2:
        raise DataError(
            f"{row.where}: there {'is one choice' if texts else 'are no choices'}, expected at least 2.",
            "Remove the row, or give the answers of all rows as choices.",
        )
    if not all(text.strip() for text in texts):
        raise DataError(f"{row.where}: one of the choices is empty ({short(texts)}).", "Write every choice as text.")
    _check_once(names, names, f"{row.where}: the choices' name")
    label = _label(row, settings.label_column, texts, names)
    # Two equal wrong answers stay: benchmarks such as OpenBookQA have rows with them.
    _check_once([texts[label]], texts, f"{row.where}: the right choice")
    return Choices(texts, label)


def _answers(row: Row, settings: DataSettings) -> tuple[list[str], list[str]]:
    """Texts, and their names where they have some."""
    if settings.choices is not None:
        return list(settings.choices), []
    column = settings.choices_column
    names: list[str] = []
    texts: Any = row.value(column, "choices_column")
    if isinstance(texts, dict) and "text" in texts:
        # ARC names its answers A-D or 1-4 beside their texts.
        texts, given = texts["text"], texts.get("label")
        names = [str(name) for name in given] if isinstance(given, list) else []
        if given is not None and isinstance(texts, list) and len(names) != len(texts):
            raise DataError(
                f"{row.where}: column {column!r} has {len(texts)} texts, but {short(given)} as their names.",
                'Give each text its name in "label", or leave "label" out.',
            )
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DataError(
            f"{row.where}: column {column!r} holds {short(texts)}, expected a list of texts.",
            'Write ["...", "..."] or {"text": [...], "label": [...]}, or give the answers of all rows as choices.',
        )
    return [row.whole(text, column) for text in texts], names


def _check_once(values: list[str], among: list[str], what: str) -> None:
    twice = next((value for value in values if among.count(value) > 1), None)
    if twice is not None:
        raise DataError(
            f"{what} {short(twice)} is there twice, so it cannot be told from the other.",
            "Make them differ, or remove the row.",
        )


def _label(row: Row, column: str, texts: list[str], names: list[str]) -> int:
    label, what = row.value(column, "label_column"), f"{row.where}: the label"
    if not isinstance(label, (str, int)):
        raise DataError(
            f"{what} in column {column!r} is {type(label).__name__} ({short(label)}), expected an int.",
            "Write the index of the right choice from 0, its text, or its letter.",
        )
    if str(label) in names:
        return names.index(str(label))
    if isinstance(label, str):
        index = _meant(label, texts, f"{what} in column {column!r}, {label!r},")
        if index is not None:
            return index
    number = isinstance(label, int) or re.fullmatch("-?[0-9]{1,18}", label)  # the numbers of a CSV file are text
    if not number or any(name.isdecimal() for name in names):
        named = f", named {short(names)}" if names else ""
        raise DataError(
            f"{what} {short(label)} in column {column!r} is none of the choices ({short(texts)}{named}).",
            f"Write the {'name' if names else 'index from 0'} of the right choice, its text, or its letter.",
        )
    if 0 <= int(label) < len(texts):
        return int(label)
    raise DataError(
        f"{what} {int(label)} in column {column!r} is out of range: "
        f"there are {len(texts)} choices, counted from 0 to {len(texts) - 1}.",
        "Correct the label; a label of -1 often marks a test set without answers, which cannot be used.",
    )


def _meant(label: str, texts: list[str], what: str) -> int | None:
    """The choice whose text or letter ``label`` is; a text that is another one's letter or index is refused."""
    letters = list(string.ascii_uppercase[: len(texts)])
    indices = [str(index) for index in range(len(texts))]
    if label not in texts:
        return letters.index(label) if label in letters else None
    index = texts.index(label)
    if label in letters and letters.index(label) != index:
        raise DataError(
            f"{what} is the text of one choice and the letter of another.",
            "Write the right choice's index from 0 as a number.",
        )
    if label in indices and indices.index(label) != index:
        raise DataError(
            f"{what} is the text of one choice and the index of another.",
            "Write the right choice's letter (A for the first).",
        )
    return index
