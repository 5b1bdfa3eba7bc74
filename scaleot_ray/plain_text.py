"""Text of other parties on a screen: a terminal obeys control characters, and nobody else's may steer it."""

from __future__ import annotations

import re

# C0 but tab and line feed, DEL and C1; marks that turn the direction of writing; halves of surrogate pairs.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def plain_text(text: str) -> str:
    """``text`` with ``�`` for every character that would steer a terminal; tabs and line feeds stay."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))


def plain_line(text: str) -> str:
    """:func:`plain_text` on one line, so that a value cannot look like two."""
    return plain_text(" ".join(text.splitlines()))
