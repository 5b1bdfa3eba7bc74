"""The benchmark's files in miniature: the same folders and columns, answers that a tiny model can learn."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_WORDS = ("owner", "layer", "plug-in", "data", "text", "answer", "right", "other", "tunes", "part")


def write_tiny_data(folder: Path, seed: int = 0) -> Path:
    """WikiText-2 ``valid`` and ``test``, ARC-Easy, Banking77 and SST-2 ``train`` and ``test``; gives the folder."""
    order = random.Random(seed)

    def text(words: int) -> str:
        return " ".join(order.choice(_WORDS) for _ in range(words))

    def questions(count: int) -> list[dict[str, Any]]:
        # The right answer is always the short one: learnt in a few steps.
        rows = []
        for _ in range(count):
            label = order.randrange(3)
            choices = ["yes" if index == label else "never in the other part" for index in range(3)]
            rows.append({"question": text(3), "choices": choices, "label": label})
        return rows

    for split, articles in (("valid", 12), ("test", 9)):
        _write(folder / "wikitext2" / f"{split}.parquet", [{"text": text(90)} for _ in range(articles)])
    for split, count in (("train", 40), ("test", 16)):
        _write(folder / "arc_easy" / f"{split}.parquet", questions(count))
        intents = [f"intent_{order.randrange(12)}?" for _ in range(3 * count)]
        _write(folder / "banking77" / f"{split}.parquet", [{"text": intent, "label": intent} for intent in intents])
        labels = [order.randrange(2) for _ in range(count)]
        _write(folder / "sst2" / f"{split}.parquet", [{"text": _WORDS[5 + label], "label": label} for label in labels])
    return folder


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
