"""A tiny model and data, and what the commands made of them, shared by the tests of this folder."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.command import Warm, scaleot
from tests.tiny_models import save_tiny

WORDS = ("the", "owner", "tunes", "plug", "in", "layers", "on", "data", "that", "never", "leaves", "machine", "answer")
STAGE_ONE = ("steps=4", "block_size=32", "harmonizer_rank=8", "start_tokens=512", "generated_tokens=512")
BUILD = [argument for item in STAGE_ONE for argument in ("--set", f"stage_one.{item}")]
BUILD += ["--set", "emulator.fit_tokens=1024"]
TUNE = ["--set", "tune.steps=4", "--set", "tune.block_size=32"]


def text_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Rows of made-up text."""
    draw = random.Random(seed)
    return [{"text": " ".join(draw.choices(WORDS, k=40))} for _ in range(count)]


def write_rows(path: Path, rows: list[dict[str, object]] | list[dict[str, str]]) -> None:
    """Rows as JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """Runs commands without loading the libraries each time."""
    server = Warm(tmp_path_factory.mktemp("warm"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, an emulator built by ``scaleot build``, and a delta by ``scaleot tune``."""
    folder = tmp_path_factory.mktemp("place")
    save_tiny(folder / "model")
    write_rows(folder / "public.jsonl", text_rows(40, 0))
    write_rows(folder / "train.jsonl", text_rows(20, 1))
    write_rows(folder / "test.jsonl", text_rows(8, 2))
    write_rows(
        folder / "choice.jsonl",
        [{"question": "one of", "choices": ["the owner", "the data"], "label": index % 2} for index in range(12)],
    )
    built = scaleot(
        *("build", "--model", "model", "--public", "public.jsonl", "--output", "emulator", "--alpha", 0.5),
        *("--beta", 0.5, "--plug-in-layers", 2, *BUILD, "--format", "json"),
        cwd=folder,
    )
    assert built.code == 0, built.err
    (folder / "build.json").write_text(built.out)
    (folder / "build.err").write_text(built.err)
    tuned = scaleot(
        *("tune", "--emulator", "emulator", "--train", "train.jsonl", "--test", "test.jsonl", "--output", "tuned"),
        *("--method", "lora", *TUNE, "--format", "json"),
        cwd=folder,
    )
    assert tuned.code == 0, tuned.err
    (folder / "tune.json").write_text(tuned.out)
    return folder
