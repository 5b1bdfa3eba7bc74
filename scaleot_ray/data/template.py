"""Prompts with a row's columns in them: ``Question: {question}\\nAnswer:``."""

from __future__ import annotations

import math
import string

from scaleot_ray.data.rows import Row, short
from scaleot_ray.errors import DataError


class PromptTemplate:
    """Text with ``{column}`` for a column's value and ``{{``, ``}}`` for braces; nothing else is interpreted.

    Raises:
        DataError: a brace is left open, or something other than a column's name stands in one.
    """

    def __init__(self, text: str) -> None:
        remedy = "Write {column} for a column's value, and {{ or }} for a brace."
        try:
            parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise DataError(f"prompt_template: {error} in {text!r}.", remedy) from None
        for _, column, specification, conversion in parts:
            if column == "" or specification or conversion:
                raise DataError(f"prompt_template: {text!r} has a place that is no plain {{column}}.", remedy)
        self._parts = [(literal, column) for literal, column, _, _ in parts]

    def fill(self, row: Row) -> str:
        """The prompt for one row.

        Raises:
            DataError: the row has no such column, or its value is neither text nor a finite number.
        """
        prompt = []
        for literal, column in self._parts:
            prompt.append(literal)
            if column is None:
                continue
            value = row.value(column, "the placeholder in prompt_template")
            if not isinstance(value, (str, int, float)):
                raise DataError(
                    f"{row.where}: prompt_template wants text in column {column!r}, "
                    f"which holds {type(value).__name__} ({short(value)}).",
                    "Name a column of text or numbers.",
                )
            if isinstance(value, float) and not math.isfinite(value):
                raise DataError(
                    f"{row.where}: column {column!r}, which prompt_template names, is {value}.",
                    "Fill it or remove the row; NaN often marks a value that is missing.",
                )
            prompt.append(row.whole(str(value), column))
        return "".join(prompt)
