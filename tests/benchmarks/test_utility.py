"""``python -m benchmarks.utility`` on a tiny model: points, budgets in tokens, what counts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.cells.measured import ALL_LAYERS, Measured, describe
from benchmarks.cells.runner import CellRunner
from benchmarks.cells.tasks import CHOICES_OF_77, TASKS, prepare, task_named
from benchmarks.utility.__main__ import main
from benchmarks.utility.plan import BUDGETS, Point
from benchmarks.utility.summary import markdown
from scaleot_ray.config import EmulatorSettings, StageOneSettings, TuneSettings
from scaleot_ray.errors import ConfigError
from scaleot_ray.evaluation.score import Blocks
from tests.benchmarks.tiny_data import write_tiny_data


def _run(place: Path, *more: str) -> int:
    fixed = ["--model", str(place / "model"), "--data", str(place / "data"), "--output", str(place / "out")]
    small = ["--stage-one-tokens", "1024", "--tuning-tokens", "500", "--test-share", "0.04", "--public", "wikitext2"]
    changes = ("emulator.plug_in_layers=2", "emulator.fit_tokens=1024")
    changes += ("stage_one.start_tokens=512", "stage_one.generated_tokens=512")
    emulator = [argument for change in changes for argument in ("--set", change)]
    return main([*fixed, *small, *emulator, "--threads", "1", "--device", "cpu", "--tasks", "arc_easy", *more])


def test_points_differ_in_what_was_set(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(place) == 0
    assert _run(place, "--label", "lora", "--set", "tune.method=lora", "--set", "stage_one.steps=3") == 0
    assert main(["summary", "--output", str(place / "out"), "--json", str(place / "utility.json")]) == 0
    document = json.loads((place / "utility.json").read_text())
    points = {cell["label"]: cell for cell in document["cells"]}
    assert points["defaults"]["settings"]["tune"]["method"] == "layers"
    assert points["lora"]["settings"]["tune"]["method"] == "lora"
    assert points["lora"]["settings"]["stage_one"]["steps"] == 3
    # Tokens become steps: 1,024 of 4 × 128 in stage 1 and about 500 in tuning, whatever a row's length.
    assert points["defaults"]["settings"]["stage_one"]["steps"] == 2
    steps = points["defaults"]["settings"]["tune"]["steps"]
    assert 2 <= steps <= 20
    table = capsys.readouterr().out
    assert "| arc_easy | lora |" in table
    assert str(place) not in table


def test_all_layers_are_tuned_once_and_added_to_a_finished_cell(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _run(place, "--label", "papers") == 0
    cell = next((place / "out" / "cells").glob("arc_easy-seed0-papers.json"))
    before = json.loads(cell.read_text())
    assert _run(place, "--label", "papers", "--all-layers") == 0
    after = json.loads(cell.read_text())
    row = after["rows"].pop(ALL_LAYERS)
    assert after == before  # nothing else was computed again
    assert row["sums"]["log_likelihood"] != before["rows"]["full_tuned"]["sums"]["log_likelihood"]

    monkeypatch.setattr(CellRunner, "_tune_all_layers", None)  # a second label finds the row where it was kept
    assert _run(place, "--label", "again", "--all-layers") == 0
    assert main(["summary", "--output", str(place / "out"), "--json", str(tmp_path / "utility.json")]) == 0
    document = json.loads((tmp_path / "utility.json").read_text())
    points = {entry["label"]: entry["measures"]["log_likelihood"] for entry in document["over_seeds"]}
    assert points["papers"]["rows"][ALL_LAYERS] == points["again"]["rows"][ALL_LAYERS]
    assert points["again"]["gain_of_all_layers"]["value"] != points["again"]["gain"]["value"]
    assert _run(place, "--label", "papers", "--seeds", "1") == 0  # without that row: no mean over seeds then
    assert main(["summary", "--output", str(place / "out"), "--json", str(tmp_path / "utility.json")]) == 0
    mixed = json.loads((tmp_path / "utility.json").read_text())["over_seeds"]
    papers = next(entry for entry in mixed if entry["label"] == "papers")
    assert len(papers["seeds"]) == 2
    assert ALL_LAYERS not in papers["measures"]["accuracy"]["rows"]
    # Learnt faster with every layer, so the same plug-in recovers a smaller share.
    assert points["again"]["rows"][ALL_LAYERS]["value"] > points["again"]["rows"]["full_tuned"]["value"]


def test_a_point_needs_known_keys(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(place, "--set", "tune.stepz=3") == 2
    assert "steps" in capsys.readouterr().err
    assert _run(place, "--set", "stage_two.steps=3") == 2
    assert "stage_two" in capsys.readouterr().err
    assert _run(place, "--label", "../x") == 2
    with pytest.raises(ConfigError):
        Point("x", "python", BUDGETS["small"], ("stage_one.steps=many",)).sections()


def test_a_budget_says_what_is_spent_unless_settings_do() -> None:
    spent = Point("x", "python", BUDGETS["small"]).sections()
    assert spent["stage_one"].steps == 20
    assert spent["stage_one"].generated_tokens == 8_192
    assert spent["emulator"].fit_tokens == 16_384
    chosen = Point("x", "python", BUDGETS["small"], ("emulator.fit_tokens=0", "stage_one.steps=7")).sections()
    assert chosen["stage_one"].steps == 7
    assert chosen["emulator"].fit_tokens == 0


def test_every_seed_takes_as_many_steps(place: Path) -> None:
    # Batches of unlike lengths come in another order for each seed; with other steps there is no mean over seeds.
    runner = CellRunner(str(place / "model"), place / "data", place / "out", "cpu")
    point = Point("x", "wikitext2", replace(BUDGETS["small"], tuning_tokens=2_000_000))
    assert len({point.cell(task_named("arc_easy"), seed, runner).tune.steps for seed in range(4)}) == 1


def test_the_middle_budget_is_what_the_defaults_spend() -> None:
    sections = Point("x", "python", BUDGETS["medium"]).sections()
    defaults = {"stage_one": StageOneSettings(), "emulator": EmulatorSettings(), "tune": TuneSettings()}
    assert sections == defaults
    tune = defaults["tune"]
    assert BUDGETS["medium"].tuning_tokens == tune.steps * tune.batch_size * tune.block_size


def test_the_paper_recipe_has_no_fit_and_its_own_start() -> None:
    sections = Point("x", "python", BUDGETS["small"], ("emulator.alpha=0.25",), "paper").sections()
    assert sections["stage_one"].start == "random"
    assert sections["stage_one"].generated_tokens == 0
    assert sections["emulator"].fit_tokens == 0
    assert sections["emulator"].alpha == 0.25


def _rows(plug_in: float) -> dict[str, Measured]:
    values = {"full_zero_shot": 3.0, "emulator_zero_shot": 4.0, "emulator_tuned": 2.8, "plug_in": plug_in}
    spread = np.linspace(0.9, 1.1, 40)
    return {
        row: Measured("loss", {"loss": Blocks(10 * value * spread, np.full(40, 10), higher_is_better=False)})
        for row, value in (values | {"full_tuned": 2.5, ALL_LAYERS: 1.0}).items()
    }


def _entry(plug_in: float) -> dict[str, Any]:
    measures = describe(_rows(plug_in))
    measures["loss"]["gain"]["seeds"] = {"0": 0.3, "1": None, "2": 0.9}
    facts = {"task": "t", "label": "l", "kind": "text", "loss_margin": 1.0, "verbatim_share": 0.5}
    return {**facts, "seeds": {"0": 0, "1": 0, "2": 0}, "measures": measures}


def test_a_gain_counts_only_ahead_of_the_tuned_emulator() -> None:
    found = describe(_rows(2.6))["loss"]
    assert found["gain"]["ahead"]["value"] == pytest.approx(0.4)
    assert found["gain"]["ahead"]["low"] == pytest.approx(0.4)  # all rows are of one shape
    assert found["gain"]["counts"]
    # Of tuning every layer the same lead is a tenth of the gain.
    assert found["gain_of_all_layers"]["ahead"]["value"] == pytest.approx(0.1)
    assert not found["gain_of_all_layers"]["counts"]
    shown = markdown({"over_seeds": [_entry(2.6)]})
    assert "| 40 % | 0.80 [0.80, 0.80] | 0.30 to 0.90 | (0.20 [0.20, 0.20]) |" in shown
    assert "| 10 % | (0.50 [0.50, 0.50]) |" in markdown({"over_seeds": [_entry(2.75)]})


def test_banking_rows_hold_their_own_intent_once(tmp_path: Path) -> None:
    data = write_tiny_data(tmp_path / "data")
    for part in prepare(TASKS["banking77"], data, tmp_path / "work", rows=20, block_size=64):
        rows = [json.loads(line) for line in Path(part.path).read_text().splitlines()]
        assert rows
        for row in rows:
            assert row["choices"][row["label"]] == row["text"].replace("_", " ").rstrip("?")
            assert len(set(row["choices"])) == len(row["choices"]) == CHOICES_OF_77
