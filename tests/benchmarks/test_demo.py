"""``python -m benchmarks.demo`` on a tiny model: the report with its command and environment, and no path in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.demo import main, without_paths
from tests.tiny_models import save_tiny

SMALL = (
    *("stage_one.steps=2", "stage_one.block_size=32", "stage_one.harmonizer_rank=8", "stage_one.start_tokens=512"),
    *(
        "emulator.plug_in_layers=2",
        "tune.steps=2",
        "tune.block_size=32",
        "evaluate_examples=8",
        "owner_cpus=1",
        "evaluator=false",
    ),
)


@pytest.mark.usefixtures("connected_ray")
def test_the_report_is_written_without_paths(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    arguments = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "run")]
    for item in SMALL:
        arguments += ["--set", item]
    assert main([*arguments, "--json", str(tmp_path / "results" / "demo.json")]) == 0
    text = (tmp_path / "results" / "demo.json").read_text()
    assert str(tmp_path) not in text
    document = json.loads(text)
    assert document["command"].startswith(
        "python -m benchmarks.demo --model model --output run --set stage_one.steps=2"
    )
    assert {"revision", "dirty", "torch", "cores"} <= document["environment"].keys()
    report = document["report"]
    assert (report["model"], report["directory"], report["audit"]) == ("model", "run", "audit.jsonl")
    whole = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report == {**whole, **{key: report[key] for key in ("model", "directory", "audit")}}
    assert report["tenants"][0]["emulator_tuned"] > 0


def test_only_paths_are_shortened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    report = {
        "schema": "scaleot.run/1",
        "model": "some-owner/some-model",
        "directory": "runs/demo",
        "tenants": [{"audit": "/srv/run/audit.jsonl", "blocks": 8, "reason": None}],
    }
    assert without_paths(report) == {
        **report,
        "directory": "demo",
        "tenants": [{"audit": "audit.jsonl", "blocks": 8, "reason": None}],
    }


def test_an_error_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--json", "demo.json"]) == 2
    assert "the demo's model" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
