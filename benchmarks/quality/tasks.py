"""The tasks: which files, which prompts, which rows to tune on and which to measure on."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaleot_ray.config import DataSettings
from scaleot_ray.data import open_rows
from scaleot_ray.errors import ConfigError

CHARACTERS_PER_TOKEN = 4.2
"""Of WikiText-2 under SmolLM2's tokenizer (4.0), a little more than measured so that blocks suffice."""


@dataclass(frozen=True)
class Task:
    """One data owner's task; prompts are those of lm-evaluation-harness.

    Attributes:
        name: also the folder of its files.
        columns: how a row becomes a prompt with answers; empty for plain text.
        batch_size: sequences per step.
        block_size: tokens per sequence; longer prompts lose their start (none does with SmolLM2).
        test_rows: rows or blocks measured at the full budget.
    """

    name: str
    columns: dict[str, Any]
    batch_size: int
    block_size: int
    test_rows: int


TASKS = {
    task.name: task
    for task in (
        Task("arc_easy", {"task": "choice", "prompt_template": "Question: {question}\nAnswer:"}, 8, 256, 200),
        Task("openbookqa", {"task": "choice", "prompt_template": "{question}"}, 16, 256, 400),
        Task(
            "sst2",
            {
                "task": "choice",
                "prompt_template": "{text}\nQuestion: Is this sentence positive or negative?\nAnswer:",
                "choices": ("negative", "positive"),
            },
            8,
            256,
            500,
        ),
        Task("wikitext2", {}, 4, 128, 200),
    )
}


def public_text(data: Path) -> DataSettings:
    """The model owner's public text: WikiText-2 ``valid``."""
    return DataSettings(path=str(data / "wikitext2" / "valid.parquet"))


def task_named(name: str) -> Task:
    """A task by its name.

    Raises:
        ConfigError: there is no such task.
    """
    if name not in TASKS:
        raise ConfigError(f"--tasks: there is no task {name!r}.", f"Take some of {', '.join(TASKS)}.")
    return TASKS[name]


def prepare(task: Task, data: Path, folder: Path, rows: int, block_size: int) -> tuple[DataSettings, DataSettings]:
    """Rows to tune on and rows to measure on, the same for every seed.

    Multiple choice: the task's ``train`` as it is, and ``rows`` of its ``test`` drawn once. WikiText-2:
    the articles of ``test``, half of them to tune on; of the others the beginnings, so that a few
    hundred blocks come from all of them.

    Args:
        task: which one.
        data: folder of the tasks' files.
        folder: where drawn rows are written.
        rows: test rows, or blocks of text.
        block_size: tokens per block.

    Raises:
        DataError: a file is missing or is not what it should be.
    """
    source = data / task.name / "test.parquet"
    found = [dict(row) for row in open_rows(DataSettings(path=str(source)))]
    random.Random(0).shuffle(found)
    test = folder / f"{task.name}-test.jsonl"
    if task.columns:
        _write(test, found[:rows])
        train = data / task.name / "train.parquet"
        return DataSettings(path=str(train), **task.columns), DataSettings(path=str(test), **task.columns)
    half = len(found) // 2
    tuning, measured = found[:half], found[half:]
    characters = math.ceil(rows * block_size * CHARACTERS_PER_TOKEN / len(measured))
    _write(test, [{"text": row["text"][:characters]} for row in measured])
    train = folder / f"{task.name}-train.jsonl"
    _write(train, tuning)
    return DataSettings(path=str(train)), DataSettings(path=str(test))


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
