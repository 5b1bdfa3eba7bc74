"""A tiny model, tiny datasets and the settings of a whole run on them."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scaleot_ray.config import RunSettings, parse
from tests.tiny_models import save_tiny

WORDS = (
    *("the", "owner", "tunes", "plug", "in", "layers", "on", "data", "that", "never"),
    *("leaves", "machine", "and", "it", "is", "right", "one", "other", "answer", "text"),
)


def write_text(path: Path, words: Sequence[str], documents: int, seed: int = 0) -> Path:
    """JSON Lines of random sentences over ``words``."""
    rng = random.Random(seed)
    rows = ({"text": " ".join(rng.choice(words) for _ in range(40))} for _ in range(documents))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_tiny_run(folder: Path, **changes: Any) -> RunSettings:
    """Writes a tiny Llama and text for a public part and two tenants; returns the settings of a run.

    Args:
        changes: sections to change, by name; a section's own keys are merged into it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model").exists():
        save_tiny(folder / "model")
        write_text(folder / "public.jsonl", WORDS, 60)
        for number, name in enumerate(("alice", "bob")):
            words = WORDS[number * 10 : number * 10 + 10]
            write_text(folder / f"{name}-train.jsonl", words, 40, seed=1)
            write_text(folder / f"{name}-test.jsonl", words, 15, seed=2)
    values: dict[str, Any] = {
        "model": {"path": str(folder / "model"), "device": "cpu"},
        "public": {"path": str(folder / "public.jsonl")},
        "stage_one": {"steps": 6, "block_size": 32, "harmonizer_rank": 4, "start_tokens": 512, "generated_tokens": 512},
        "emulator": {"alpha": 0.5, "beta": 0.8, "plug_in_layers": 2, "fit_tokens": 1024},
        "tune": {"steps": 20, "block_size": 32, "learning_rate": 1e-3},
        "tenants": [
            {
                "name": name,
                "train": {"path": str(folder / f"{name}-train.jsonl")},
                "test": {"path": str(folder / f"{name}-test.jsonl")},
            }
            for name in ("alice", "bob")
        ],
        "output": str(folder / "run"),
        "owner_cpus": 1,
        "evaluator": True,
        "evaluate_examples": 24,
    }
    for name, change in changes.items():
        values[name] = {**values[name], **change} if isinstance(change, dict) and name in values else change
    return parse(RunSettings, values)
