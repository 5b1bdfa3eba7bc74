"""``scaleot run`` and ``scaleot demo`` with a Ray of their own, once, on a tiny model."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from scaleot_ray.cli.demo import MODEL, demo_settings, forget, model_section
from scaleot_ray.cli.run import crossings, emulator_lines
from scaleot_ray.errors import ConfigError
from tests.cli.command import Warm, scaleot, started
from tests.cli.documented_keys import JsonPage
from tests.cli.test_documents import privacy_level, undocumented

ROWS = ("full_zero_shot", "emulator_zero_shot", "emulator_tuned", "plug_in", "full_tuned")


def run_settings(place: Path) -> dict[str, Any]:
    def data(name: str, **more: str) -> dict[str, str]:
        return {"path": str(place / name), **more}

    choice = data("choice.jsonl", task="choice", prompt_column="question")
    return {
        "model": {"path": str(place / "model")},
        "public": data("public.jsonl"),
        "stage_one": {"steps": 4, "block_size": 32, "harmonizer_rank": 8, "start_tokens": 512, "generated_tokens": 512},
        "emulator": {"plug_in_layers": 2, "alpha": 0.5, "beta": 0.5, "fit_tokens": 1024},
        "tune": {"steps": 4, "block_size": 32},
        "tenants": [
            {"name": "alice", "train": data("train.jsonl"), "test": data("test.jsonl")},
            {"name": "bob", "train": choice, "test": choice},
        ],
        "aggregation": {},
        "evaluator": True,
        "owner_cpus": 1,
        "output": "out",
    }


def test_a_run_from_a_file(place: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run_settings(place)))
    done = scaleot("run", "run.yaml", "--set", "tenants.0.name=carol", "--format", "json", cwd=tmp_path, timeout=500)
    assert done.code == 0, done.err
    report = done.json
    assert report["schema"] == "scaleot.run/1"
    assert [tenant["name"] for tenant in report["tenants"]] == ["carol", "bob"]
    assert [tenant["metric"] for tenant in report["tenants"]] == ["loss", "accuracy"]
    assert all(tenant[row] is not None for tenant in report["tenants"] for row in ROWS)
    assert report["peak_rss_bytes"] > 0
    assert report["seconds"]["total"] > 0
    assert len(report["emulator"]["replaced_layers"]) == 3
    assert undocumented(report) == set()
    assert all(tenant["aggregate"] is not None for tenant in report["tenants"])
    levelled = {**report["emulator"], "privacy": privacy_level(tmp_path / "out" / "emulator")}
    late = [{**report["rounds"][0], "missing": {"bob": "submitted nothing in time"}}]
    assert JsonPage().gone(report, {**report, "emulator": levelled, "rounds": late}) == set()
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    assert "tune carol: 4/4" in done.err
    assert "tune bob: 4/4" in done.err
    crossed = [json.loads(line) for line in Path(report["audit"]).read_text().splitlines()]
    lines = crossings(crossed)
    assert any(line.startswith("left model owner: emulator ") for line in lines)
    assert any(line.startswith("left data owner carol: delta ") and "metrics" in line for line in lines)
    (given,) = (line for line in lines if line.startswith("evaluator bob, declared in the settings, got: "))
    assert given.split("got: ")[1].startswith("emulator ")
    assert all(f", {kind} " in given for kind in ("full model", "rows", "delta"))

    # A second run, on the terminal's form, finds everything done; the folder is then forgotten on purpose.
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    forget(tmp_path / "copy")
    assert not (tmp_path / "copy" / "emulator").exists()
    assert not (tmp_path / "copy" / "coordinator").exists()
    assert (tmp_path / "copy" / "audit.jsonl").exists()


def test_the_demo_knows_its_models_licence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert model_section("some/model") == {"path": "some/model"}
    assert model_section(f"/elsewhere/{MODEL.name}")["licence"].startswith("Apache-2.0")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="is not here"):
        model_section(None)


def test_a_privacy_level_replaces_the_demos_own_choice(tmp_path: Path) -> None:
    settings = demo_settings("some/model", tmp_path, ["emulator.privacy=medium"])
    assert (settings.emulator.privacy, settings.emulator.plug_in_layers) == ("medium", 4)
    assert demo_settings("some/model", tmp_path, ["emulator.privacy=null"]).emulator.alpha == 0.25
    with pytest.raises(ConfigError, match="privacy=medium chooses alpha and beta, but alpha is given too"):
        demo_settings("some/model", tmp_path, ["emulator.privacy=medium", "emulator.alpha=0.5"])


def test_forget_leaves_foreign_folders_alone(tmp_path: Path) -> None:
    (tmp_path / "tenants").mkdir()
    forget(tmp_path)
    assert (tmp_path / "tenants").exists()
    forget(tmp_path / "not there")
    assert not (tmp_path / "not there").exists()


@pytest.mark.parametrize("given", ["option", "setting"])
def test_a_fresh_demo_forgets_the_folder_that_it_goes_to(given: str, tmp_path: Path, warm: Warm) -> None:
    for name in ("here", "elsewhere"):
        (tmp_path / name / "tenants").mkdir(parents=True)
        (tmp_path / name / "audit.jsonl").write_text("")
    chosen = ["--output", "here"] if given == "option" else ["--output", "elsewhere", "--set", "output=here"]
    done = warm.scaleot("demo", "--model", tmp_path / "none", *chosen, "--fresh", cwd=tmp_path)
    assert (done.code, "does not exist" in done.err) == (2, True), done.err
    assert [name for name in ("here", "elsewhere") if (tmp_path / name / "tenants").exists()] == ["elsewhere"]


def test_the_demo_with_another_model_until_interrupted(place: Path, tmp_path: Path) -> None:
    settings = [f"--set=stage_one.{item}" for item in ("steps=2000", "block_size=32", "harmonizer_rank=8")]
    arguments = [
        "--set=tune.block_size=32",
        "--set=tune.steps=2",
        "--set=owner_cpus=1",
        "--set=emulator.plug_in_layers=2",
    ]
    with started("demo", "--model", place / "model", *settings, *arguments, cwd=tmp_path) as process:
        assert process.stderr is not None
        shown = []
        for line in process.stderr:
            shown.append(line)
            if line.startswith("stage 1:"):
                process.send_signal(signal.SIGINT)
                break
        start = time.monotonic()
        out, rest = process.communicate(timeout=120)
    shown.append(rest)
    assert process.returncode == 130, "".join(shown)
    assert out == ""
    assert "Traceback" not in "".join(shown)
    assert "interrupted" in rest
    assert "Run the same command again" in rest
    assert time.monotonic() - start < 60
    folder = tmp_path / "scaleot-runs" / "demo"
    assert (folder / "text" / "public.jsonl").exists()
    assert not (folder / "emulator").exists()


@pytest.mark.parametrize("key", ["tenants.0.train.path=gone.jsonl", "owner_cpus=4000"])
def test_what_cannot_work_is_refused_before_ray_starts(place: Path, tmp_path: Path, warm: Warm, key: str) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run_settings(place)))
    done = warm.scaleot("run", "run.yaml", "--set", key, "--format", "json", cwd=tmp_path)
    assert done.code == (4 if key.startswith("owner") else 2)
    assert key.partition("=")[0] in done.error["message"]


def test_a_privacy_level_is_printed_with_what_was_reached() -> None:
    tried = [{"alpha": 0.25, "beta": 0.2, "loss_margin": 0.1, "safe_margin": 0.08, "verbatim_share": 0.8}]
    tried.append({"alpha": 0.5, "beta": 0.5, "loss_margin": 0.41, "safe_margin": 0.35, "verbatim_share": 0.62})
    emulator = {
        "replaced_layers": [3, 4],
        "dropped_layers": [],
        "layer_map": ["kept"] * 8,
        "alpha": 0.5,
        "beta": 0.5,
        "bytes": 1000,
        "full_bytes": 2000,
        "verbatim_share": 0.62,
        "loss_margin": 0.41,
        "privacy": {"level": "medium", "minimum_margin": 0.3, "maximum_verbatim": 0.7, "tried": tried},
    }
    text = "\n".join(emulator_lines(emulator))
    assert "2 of 8 layers replaced" in text
    assert "asks for a loss margin of at least 0.3 nats and at most 70% verbatim" in text
    assert "reached with α 0.5, β 0.5: 0.41 nats, 0.35 less two standard errors, and 62%" in text
