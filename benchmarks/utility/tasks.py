"""The tasks and the public texts: which files, which prompts, which rows to tune on and which to measure on."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaleot_ray.config import DataSettings
from scaleot_ray.data import open_rows
from scaleot_ray.data.demo_text import write_demo_text
from scaleot_ray.errors import ConfigError

CHARACTERS_PER_TOKEN = 4.2
"""Of WikiText-2 under SmolLM2's tokenizer (4.0), a little more than measured so that blocks suffice."""

CHOICES_OF_77 = 10
"""Intents that a Banking77 row chooses from: all 77 would take eight times as long and say little more."""


@dataclass(frozen=True)
class Task:
    """One data owner's task; prompts are those of lm-evaluation-harness where it has the task.

    Attributes:
        name: also the folder of its files.
        kind: ``text``, ``classification`` or ``choice``; gains of different kinds behave differently.
        columns: how a row becomes a prompt with answers; empty for plain text.
        batch_size: sequences per step.
        block_size: tokens per sequence; longer prompts lose their start (none does with SmolLM2).
        test_rows: rows or blocks measured at the full budget.
    """

    name: str
    kind: str
    columns: dict[str, Any]
    batch_size: int
    block_size: int
    test_rows: int


TASKS = {
    task.name: task
    for task in (
        Task("arc_easy", "choice", {"task": "choice", "prompt_template": "Question: {question}\nAnswer:"}, 8, 256, 200),
        Task("openbookqa", "choice", {"task": "choice", "prompt_template": "{question}"}, 16, 256, 400),
        Task(
            "sst2",
            "classification",
            {
                "task": "choice",
                "prompt_template": "{text}\nQuestion: Is this sentence positive or negative?\nAnswer:",
                "choices": ("negative", "positive"),
            },
            8,
            256,
            500,
        ),
        Task(
            "banking77",
            "classification",
            {"task": "choice", "prompt_template": "{text}\nQuestion: What does the customer want?\nAnswer:"},
            8,
            256,
            200,
        ),
        Task("wikitext2", "text", {}, 4, 128, 200),
        Task("python_reference", "text", {}, 4, 128, 200),
    )
}

PUBLIC = ("wikitext2", "python", "mixed")
"""The model owner's public texts: WikiText-2 ``valid``, the demo's public part (documentation of Python and its
libraries), and both."""


def task_named(name: str) -> Task:
    """A task by its name.

    Raises:
        ConfigError: there is no such task.
    """
    if name not in TASKS:
        raise ConfigError(f"--tasks: there is no task {name!r}.", f"Take some of {', '.join(TASKS)}.")
    return TASKS[name]


def public_text(name: str, data: Path, folder: Path) -> DataSettings:
    """One of the texts in ``PUBLIC``.

    Args:
        name: which one.
        data: folder of the tasks' files.
        folder: where text that is put together is written.

    Raises:
        ConfigError: there is no such text.
        DataError: a file is missing or is not what it should be.
    """
    if name not in PUBLIC:
        raise ConfigError(f"--public: there is no text {name!r}.", f"Take one of {', '.join(PUBLIC)}.")
    wikitext = DataSettings(path=str(data / "wikitext2" / "valid.parquet"))
    if name == "wikitext2":
        return wikitext
    python = DataSettings(path=str(write_demo_text(folder / "demo").public))
    if name == "python":
        return python
    documents = [dict(row)["text"] for part in (wikitext, python) for row in open_rows(part)]
    random.Random(0).shuffle(documents)
    return DataSettings(path=str(_write(folder / "mixed.jsonl", ({"text": text} for text in documents))))


def prepare(task: Task, data: Path, folder: Path, rows: int, block_size: int) -> tuple[DataSettings, DataSettings]:
    """Rows to tune on and rows to measure on, the same for every seed.

    Classification and choice: the task's ``train``, and ``rows`` of its ``test`` drawn once. WikiText-2: the
    articles of ``test``, half of them to tune on; of the others the beginnings, so that a few hundred blocks
    come from all of them. Python reference: the demo's first data owner.

    Args:
        task: which one.
        data: folder of the tasks' files.
        folder: where drawn rows are written.
        rows: test rows, or blocks of text.
        block_size: tokens per block.

    Raises:
        DataError: a file is missing or is not what it should be.
    """
    if task.name == "python_reference":
        train, test = write_demo_text(folder / "demo").tenants["language-reference"]
        return DataSettings(path=str(train)), DataSettings(path=str(test))
    found = _drawn(data / task.name / "test.parquet")
    if not task.columns:
        half = len(found) // 2
        tuning, measured = found[:half], found[half:]
        characters = math.ceil(rows * block_size * CHARACTERS_PER_TOKEN / len(measured))
        beginnings = [{"text": row["text"][:characters]} for row in measured]
        return (
            DataSettings(path=str(_write(folder / f"{task.name}-train.jsonl", tuning))),
            DataSettings(path=str(_write(folder / f"{task.name}-test.jsonl", beginnings))),
        )
    train, choices = data / task.name / "train.parquet", _CHOICES.get(task.name)
    if choices is not None:
        train = _write(folder / f"{task.name}-train.jsonl", choices(_drawn(train)))
        found = choices(found)
    test = _write(folder / f"{task.name}-test.jsonl", found[:rows])
    return DataSettings(path=str(train), **task.columns), DataSettings(path=str(test), **task.columns)


def _banking77(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row with its own intent among ``CHOICES_OF_77``; the others are drawn from all that occur."""
    order = random.Random(0)
    intents = sorted({row["label"] for row in rows})
    result = []
    for row in rows:
        wrong = [intent for intent in intents if intent != row["label"]]
        labels = [*order.sample(wrong, min(len(wrong), CHOICES_OF_77 - 1)), row["label"]]
        order.shuffle(labels)
        choices = [label.replace("_", " ").rstrip("?") for label in labels]
        result.append({"text": row["text"], "choices": choices, "label": labels.index(row["label"])})
    return result


_CHOICES: dict[str, Callable[[Sequence[dict[str, Any]]], list[dict[str, Any]]]] = {"banking77": _banking77}


def _drawn(path: Path) -> list[dict[str, Any]]:
    found = [dict(row) for row in open_rows(DataSettings(path=str(path)))]
    random.Random(0).shuffle(found)
    return found


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
