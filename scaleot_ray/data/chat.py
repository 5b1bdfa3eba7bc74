"""Chat messages → token ids through the tokenizer's template, and which of them the assistant wrote."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from jinja2 import TemplateError

from scaleot_ray.data.encoding import Encoder
from scaleot_ray.data.rows import Row, short
from scaleot_ray.errors import DataError

Message = dict[str, str]
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
ON_A_FIXED_DAY = "{% macro strftime_now(format) %}01 January 2025{% endmacro %}\n"
"""In front of a chat template that names today's date: the same rows are to give the same tokens on any day.

It ends with a line break, which Jinja drops after a block, so that the template's own start is still one of a line.
"""
# Private-use characters: no message starts or ends with them, so where two renderings differ is exact.
_STAND_IN = "\ue000answer\ue001"


def read_messages(row: Row, column: str) -> list[Message]:
    """The messages of ``row``, each with a role and a text.

    Raises:
        DataError: the column is missing, is no list of ``{"role": ..., "content": ...}``, or the
            assistant has no message or an empty one in it.
    """
    messages = row.value(column, "messages_column")
    if isinstance(messages, dict) and isinstance(messages.get("role"), list):
        # `datasets` stores a sequence of structs as a struct of lists.
        messages = [dict(zip(messages, values, strict=False)) for values in zip(*messages.values(), strict=False)]
    if not isinstance(messages, list) or not messages:
        raise DataError(
            f"{row.where}: column {column!r} holds {short(messages)}, expected a list of messages.",
            'Write [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}].',
        )
    for number, message in enumerate(messages, start=1):
        fields = message if isinstance(message, dict) else {}
        if not isinstance(fields.get("role"), str) or not isinstance(fields.get("content"), str):
            raise DataError(
                f"{row.where}: message {number} in column {column!r} is {short(message)}, "
                "expected a role and a content, both text.",
                'Write {"role": "user", "content": "..."}; tool calls and images are not supported.',
            )
        if fields["role"] == "assistant" and not fields["content"].strip():
            raise DataError(
                f"{row.where}: message {number} in column {column!r} is the assistant's and empty, so only its end "
                "would be learned.",
                "Fill it, or remove the message or the row.",
            )
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(
            f"{row.where}: no message in column {column!r} has the role 'assistant', so there is nothing to learn.",
            "Remove the row, or name the assistant's role 'assistant'.",
        )
    return [{field: row.whole(message[field], column) for field in ("role", "content")} for message in messages]


def check_template(tokenizer: Any) -> None:
    """Refuses a tokenizer that has no chat template.

    Raises:
        DataError: it has none.
    """
    if not tokenizer.chat_template:
        raise DataError(
            "task: chat needs a tokenizer with a chat template, and this one has none.",
            "Use an instruction-tuned model, set model.tokenizer to a tokenizer with a template, or write the rows "
            "as prompt and completion.",
        )


def chat_tokens(encoder: Encoder, messages: list[Message], where: str) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and for each whether the assistant wrote it (its end-of-turn token included).

    A template that marks the assistant's part with ``{% generation %}`` is taken at its word. For
    others each turn is found by rendering the conversation once more with another text in its place:
    where the two differ is the turn, whatever the template does to the turns before and after. What the template
    writes into a turn whatever its text, such as the empty thought of Qwen3 or a ``<think>`` in front of every
    thought, is the same in both and not learned. Today's date, where a template names it, is a fixed one.

    Raises:
        DataError: the template refuses the messages, e.g. for the order of their roles.
    """
    tokenizer = encoder.tokenizer
    try:
        template = ON_A_FIXED_DAY + tokenizer.get_chat_template()
        if _MARKS.search(template):
            marked = tokenizer.apply_chat_template(
                messages, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
            )
            return list(marked["input_ids"]), [bool(mark) for mark in marked["assistant_masks"]]
        return _unmarked(encoder, messages, template)
    except TemplateError as error:
        raise DataError(
            f"{where}: the tokenizer's chat template refuses the messages ({error}).",
            "Give the roles in the order that the model's template takes.",
        ) from error


def _unmarked(encoder: Encoder, messages: list[Message], template: str) -> tuple[list[int], list[bool]]:
    def render(conversation: list[Message]) -> str:
        rendered = encoder.tokenizer.apply_chat_template(conversation, chat_template=template, tokenize=False)
        return str(rendered)

    specials = [text for token in encoder.tokenizer.added_tokens_decoder.values() if (text := str(token).strip())]
    whole = render(messages)
    turns = [
        _turn(render, messages, index, whole, specials)
        for index, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    ids, places = encoder.placed(whole)
    # A token that reaches over the turn's start, such as a word with the space before it, belongs to the turn.
    return ids, [any(first < end and last > start for start, end in turns) for first, last in places]


def _turn(
    render: Callable[[list[Message]], str], messages: list[Message], index: int, whole: str, specials: list[str]
) -> tuple[int, int]:
    other = render([*messages[:index], {**messages[index], "content": _STAND_IN}, *messages[index + 1 :]])
    if _STAND_IN not in other:
        return 0, 0  # the template leaves this turn out
    start = _common(whole, other)
    end = len(whole) - _common(whole[start:][::-1], other[start:][::-1])
    after = whole[end:].lstrip()
    # The token that ends the turn is the assistant's to write as well.
    closing = max((special for special in specials if after.startswith(special)), key=len, default="")
    return start, len(whole) - len(after) + len(closing) if closing else end


def _common(one: str, other: str) -> int:
    """Length of the common start of two texts."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (left, right) in pairs if left != right), min(len(one), len(other)))
