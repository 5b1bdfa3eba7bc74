"""``python -m benchmarks.demo`` on a tiny model: the report with its command and environment, and no path in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.demo import PATHS, main
from benchmarks.environment import environment
from benchmarks.run_report import committed, without_paths
from tests.tiny_models import save_tiny

SMALL = (
    *("stage_one.steps=2", "stage_one.block_size=32", "stage_one.harmonizer_rank=8", "stage_one.start_tokens=512"),
    *("stage_one.generated_tokens=512", "emulator.fit_tokens=1024"),
    *("emulator.plug_in_layers=2", "tune.steps=2", "tune.block_size=32", "evaluate_examples=8"),
    *("owner_cpus=1", "evaluator=false"),
)


@pytest.mark.slow
@pytest.mark.usefixtures("connected_ray")
def test_the_report_is_written_without_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny(tmp_path / "model")
    arguments = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "run")]
    for item in SMALL:
        arguments += ["--set", item]
    assert main([*arguments, "--json", str(tmp_path / "results" / "demo.json")]) == 0
    text = (tmp_path / "results" / "demo.json").read_text()
    assert str(tmp_path) not in text
    found, whole = json.loads(text), json.loads((tmp_path / "run" / "report.json").read_text())
    assert whole["model"] == str(tmp_path / "model")
    assert found["report"] == {**whole, "model": "model", "directory": "run", "audit": "audit.jsonl"}
    assert found["report"]["tenants"][0]["emulator_tuned"] > 0
    assert "emulator zero-shot" in capsys.readouterr().out


def test_the_report_is_committed_with_its_command_and_environment(tmp_path: Path) -> None:
    model, run = str(tmp_path / "model"), str(tmp_path / "run")
    report = {"schema": "scaleot.run/1", "model": model, "directory": run, "audit": run + "/audit.jsonl"}
    given = ["--model", model, "--output", run, "--json", str(tmp_path / "a.json"), "--set", f"public.path={tmp_path}"]
    found = committed("demo", {**report, "peak_rss_bytes": float("nan")}, given, environment(), PATHS)
    assert str(tmp_path.parent) not in json.dumps(found)
    shown = f"--model model --output run --json a.json --set public.path={tmp_path.name}"
    assert found["command"] == f"python -m benchmarks.demo {shown}"
    assert {"revision", "dirty", "torch", "cores"} <= found["environment"].keys()
    shortened = {"model": "model", "directory": "run", "audit": "audit.jsonl"}
    assert found["report"] == {**report, **shortened, "peak_rss_bytes": None}


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
