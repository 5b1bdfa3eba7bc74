"""``python -m benchmarks.privacy`` on a tiny model: what each level reached, or why it is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.privacy import main
from tests.cli.conftest import text_rows, write_rows
from tests.tiny_models import save_tiny

STAGE_ONE = (
    "steps=2",
    "block_size=16",
    "batch_size=2",
    "harmonizer_rank=8",
    "start_tokens=256",
    "generated_tokens=256",
)


@pytest.mark.slow
def test_every_level_is_reached_or_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    write_rows(tmp_path / "public.jsonl", text_rows(60, 0))
    arguments = ["--model", str(tmp_path / "model"), "--public", str(tmp_path / "public.jsonl")]
    arguments += ["--output", str(tmp_path / "run"), "--json", str(tmp_path / "privacy.json"), "--threads", "1"]
    for item in STAGE_ONE:
        arguments += ["--set", f"stage_one.{item}"]
    arguments += ["--set", "emulator.fit_tokens=1024"]
    assert main([*arguments, "--plug-in-layers", "2", "4"]) == 0
    text = (tmp_path / "privacy.json").read_text()
    assert str(tmp_path) not in text
    found = json.loads(text)
    assert [(row["plug_in_layers"], row["level"]) for row in found["levels"]] == [
        (count, level) for count in (2, 4) for level in ("low", "medium", "high")
    ]
    for row in found["levels"]:
        if "refused" in row:
            assert row["refused"].startswith("emulator.privacy: ")
            continue
        last = row["tried"][-1]
        assert last["safe_margin"] >= row["minimum_margin"]
        assert last["verbatim_share"] <= row["maximum_verbatim"]
    assert found["stage_one"]["steps"] == 2
