"""Which passages texts share, and cutting them out.

A passage is 50 characters in a row after every run of white space has become one space. Rolling
hashes of the passages at every offset make this a matter of a second for megabytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

PASSAGE = 50
Hashes = NDArray[np.uint64]
Document = list[str]  # its paragraphs

_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2⁶⁴
_INVERSE = pow(_BASE, -1, 1 << 64)


def collapsed(texts: Iterable[str]) -> str:
    """All texts in one line, white space collapsed."""
    return " ".join(word for text in texts for word in text.split())


def passage_hashes(text: str) -> Hashes:
    """A hash of the passage at every offset of a collapsed text: (max(0, len − 49),) uint64.

    Equal passages have equal hashes; different ones almost surely have not.
    """
    count = len(text) - PASSAGE + 1
    if count < 1:
        return np.empty(0, dtype=np.uint64)
    codes = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype=np.uint32).astype(np.uint64) + 1
    # Σ code·BASE^k over a window is a difference of two prefix sums, shifted back to k = 0; all modulo 2⁶⁴.
    powers = np.cumprod(np.full(len(text), _BASE, dtype=np.uint64))
    sums = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(codes * powers)])
    back = np.cumprod(np.full(count, _INVERSE, dtype=np.uint64))
    return (sums[PASSAGE:] - sums[:-PASSAGE]) * back


def paragraphs(text: str) -> Document:
    """The paragraphs of a text: what empty lines separate."""
    return [paragraph for paragraph in re.split(r"\n[ \t]*\n", text) if paragraph.strip()]


def without_passages(documents: Sequence[Document], taken: Hashes, shortest: int) -> list[Document]:
    """The documents without the paragraphs that share a passage with what is ``taken``.

    Passages that run over the end of a paragraph or of a document count as well. Of the paragraphs
    that such a passage touches, the one in its middle goes.

    Args:
        documents: the documents, in the order they will be written in.
        taken: hashes of the passages that must not appear.
        shortest: documents left with fewer characters go as a whole.
    """
    known = np.unique(taken)
    kept = [document for document in documents if _characters(document) >= shortest]
    while True:
        words = [collapsed([paragraph]) for document in kept for paragraph in document]
        shared = np.flatnonzero(np.isin(passage_hashes(" ".join(words)), known))
        if not len(shared):
            return kept
        ends = np.cumsum([len(text) + 1 for text in words])
        dropped = set(np.searchsorted(ends, shared + PASSAGE // 2, side="right").tolist())
        number = 0
        left = []
        for document in kept:
            left.append([text for index, text in enumerate(document, start=number) if index not in dropped])
            number += len(document)
        kept = [document for document in left if _characters(document) >= shortest]


def _characters(document: Document) -> int:
    return sum(len(paragraph.strip()) for paragraph in document)
