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
    ``{"text": [...], "label": [...]}``. The label is an index from 0, an answer's name, its text or its letter.

    Raises:
        DataError: a column is missing or of the wrong type, there are fewer than two answers, or the
            label is none of them.
    """
    names: list[str] = []
    if settings.choices is not None:
        texts: Any = list(settings.choices)
    else:
        texts = row.value(settings.choices_column, "choices_column")
        if isinstance(texts, dict) and "text" in texts:
            names = [str(name) for name in texts.get("label") or []]
            texts = texts["text"]
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise DataError(
                f"{row.where}: column {settings.choices_column!r} holds {short(texts)}, expected a list of texts.",
                'Write ["...", "..."] or {"text": [...], "label": [...]}, or give the answers of all rows as choices.',
            )
    if len(texts) < 2:
        raise DataError(
            f"{row.where}: there {'is one choice' if texts else 'are no choices'}, expected at least 2.",
            "Remove the row, or give the answers of all rows as choices.",
        )
    return Choices(texts, _label(row, settings.label_column, texts, names))


def _label(row: Row, column: str, texts: list[str], names: list[str]) -> int:
    label = row.value(column, "label_column")
    if isinstance(label, str):
        # ARC names its answers A-D or 1-4 beside their texts; a plain list can be meant by text or by letter.
        for known in (names, texts, list(string.ascii_uppercase[: len(texts)])):
            if label in known:
                _check_unambiguous(label, known, known is texts, f"{row.where}: the label in column {column!r}")
                return known.index(label)
        if not re.fullmatch("-?[0-9]+", label):  # the numbers of a CSV file are text
            raise DataError(
                f"{row.where}: the label {short(label)} in column {column!r} is none of the choices ({short(texts)}).",
                "Write the index of the right choice from 0, its text, or its letter.",
            )
        label = int(label)
    if isinstance(label, int):
        if 0 <= label < len(texts):
            return int(label)
        raise DataError(
            f"{row.where}: the label {label} in column {column!r} is out of range: "
            f"there are {len(texts)} choices, counted from 0 to {len(texts) - 1}.",
            "Correct the label; a label of -1 often marks a test set without answers, which cannot be used.",
        )
    raise DataError(
        f"{row.where}: the label in column {column!r} is {type(label).__name__} ({short(label)}), expected an int.",
        "Write the index of the right choice from 0, its text, or its letter.",
    )


def _check_unambiguous(label: str, known: list[str], texts: bool, what: str) -> None:
    """Refuses the text of a number that is one choice's text and another one's index."""
    if texts and label.isdecimal() and known.index(label) != int(label) < len(known):
        raise DataError(
            f"{what}, {label!r}, is the text of one choice and the index of another.",
            "Write the right choice's letter (A for the first).",
        )
