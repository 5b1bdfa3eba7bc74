"""The scripts for ``ray job submit`` do the same from a YAML file."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.cli.command import PROJECT, Warm


def test_all_four(place: Path, tmp_path: Path, warm: Warm) -> None:
    model = {"path": str(place / "model")}
    documents = {}
    for script, settings in {
        "build_emulator": {
            "model": model,
            "public": {"path": str(place / "public.jsonl")},
            "stage_one": {
                "steps": 2,
                "block_size": 32,
                "harmonizer_rank": 8,
                "start_tokens": 512,
                "generated_tokens": 512,
            },
            "emulator": {"plug_in_layers": 2, "alpha": 0.5, "fit_tokens": 1024},
            "output": "emulator",
        },
        "tune": {
            "emulator": "emulator",
            "train": {"path": str(place / "train.jsonl")},
            "tune": {"steps": 2, "block_size": 32},
            "output": "tuned",
        },
        "evaluate": {
            "model": model,
            "emulator": "emulator",
            "delta": "tuned/delta",
            "test": {"path": str(place / "test.jsonl")},
            "block_size": 16,
        },
        "plug_in": {"model": model, "emulator": "emulator", "delta": "tuned/delta", "output": "merged"},
    }.items():
        (tmp_path / "job.yaml").write_text(yaml.safe_dump(settings))
        arguments = ["--set", "block_size=32"] if script == "evaluate" else []
        done = warm.run(PROJECT / "jobs" / f"{script}.py", "job.yaml", *arguments, "--format", "json", cwd=tmp_path)
        assert done.code == 0, done.err
        documents[script] = done.json
    schemas = [documents[script]["schema"] for script in documents]
    assert schemas == ["scaleot.build/1", "scaleot.tune/1", "scaleot.eval/1", "scaleot.plug/1"]
    assert documents["evaluate"]["plug_in"] > 0
    assert (tmp_path / "merged" / "config.json").exists()


def test_a_wrong_file(tmp_path: Path, warm: Warm) -> None:
    (tmp_path / "job.yaml").write_text("emulater: x\n")
    done = warm.run(PROJECT / "jobs" / "tune.py", "job.yaml", "--format", "json", cwd=tmp_path)
    assert done.code == 2
    assert "'emulater'" in done.error["message"]


@pytest.mark.parametrize("script", ["build_emulator", "tune", "plug_in", "evaluate", "federate"])
def test_help(script: str, warm: Warm) -> None:
    done = warm.run(PROJECT / "jobs" / f"{script}.py", "--help", cwd=PROJECT)
    assert done.code == 0
    assert "ray job submit --working-dir jobs" in " ".join(done.out.split())
    assert "CONFIG.yaml" in done.out
