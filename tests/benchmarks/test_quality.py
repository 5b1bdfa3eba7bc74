"""``python -m benchmarks.quality`` on a tiny model: cells, resuming, the summary."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.cells.measured import Measured, describe, mean_over_seeds, score_from, score_record
from benchmarks.cells.tasks import TASKS, prepare
from benchmarks.quality.__main__ import main
from benchmarks.quality.plan import BUDGETS, Choice, Triplet, choices
from scaleot_ray.errors import ConfigError, DataError
from scaleot_ray.evaluation.choice import ChoiceScore
from scaleot_ray.evaluation.score import Blocks
from scaleot_ray.evaluation.table import ROWS
from tests.benchmarks.tiny_data import write_tiny_data

BUDGET = BUDGETS["small"]


def _run(place: Path, *more: str) -> int:
    fixed = ["--model", str(place / "model"), "--data", str(place / "data"), "--output", str(place / "out")]
    small = [
        "--budget",
        "small",
        "--steps",
        "3",
        "--stage-one-steps",
        "2",
        "--evaluate-examples",
        "8",
        "--threads",
        "1",
        "--device",
        "cpu",
    ]
    return main([*fixed, *small, "--settings", "2,0.5,0.5", *more])


def test_cells_are_computed_once_and_summarised(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(place, "--tasks", "arc_easy", "--seeds", "0,1") == 0
    err = capsys.readouterr().err
    assert "tokens a tuning run" in err
    assert "[6/6]" in err
    files = sorted((place / "out" / "cells").glob("*.json"))
    assert len(files) == 6
    assert not list((place / "out" / "work").iterdir())
    uniform = json.loads((place / "out" / "cells" / "arc_easy-seed0-uniform_drop-2-0.5-0.json").read_text())
    assert uniform["emulator"]["layers"] == {"dropped": 3, "kept": 3, "plug_in": 2}
    assert uniform["cell"]["beta"] == 0
    before = {path.name: path.stat().st_mtime_ns for path in files}
    # A second task in the same folder: its cells are computed, the others are skipped.
    assert _run(place, "--tasks", "arc_easy,wikitext2", "--seeds", "0", "--variants", "closed_form") == 0
    err = capsys.readouterr().err
    assert "arc_easy-seed0-closed_form-2-0.5-0.5: finished before" in err
    assert "wikitext2-seed0-closed_form-2-0.5-0.5: finished in" in err
    assert before == {path.name: path.stat().st_mtime_ns for path in files}

    assert main(["summary", "--output", str(place / "out"), "--json", str(place / "quality.json")]) == 0
    text = (place / "quality.json").read_text()
    document = json.loads(text)
    table = capsys.readouterr().out
    assert str(place) not in text + table
    assert "--model model --data data --output out" in document["commands"][0]
    assert len(document["cells"]) == 7
    groups = {(entry["task"], entry["variant"]): entry for entry in document["over_seeds"]}
    assert set(groups[("arc_easy", "closed_form")]["seeds"]) == {"0", "1"}
    accuracy = groups[("arc_easy", "closed_form")]["measures"]["log_likelihood"]
    assert set(accuracy["rows"]) == set(ROWS)
    row = accuracy["rows"]["plug_in"]
    assert row["low"] <= row["value"] <= row["high"]
    assert groups[("wikitext2", "closed_form")]["metric"] == "loss"
    assert "| arc_easy | (2, 0.5, 0) | uniform LayerDrop | 2 |" in table
    assert "Log-likelihood of the right answer" in table


def test_other_settings_are_computed_again(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ("--tasks", "sst2", "--variants", "uniform_drop")
    # What an interrupted cell left is no obstacle: the cell starts over.
    (place / "out" / "work" / "sst2-seed0-uniform_drop-2-0.5-0" / "delta").mkdir(parents=True)
    assert _run(place, *chosen) == 0
    capsys.readouterr()
    assert _run(place, *chosen, "--steps", "4") == 0
    assert "finished before" not in capsys.readouterr().err
    path = place / "out" / "cells" / "sst2-seed0-uniform_drop-2-0.5-0.json"
    assert json.loads(path.read_text())["settings"]["tune"]["steps"] == 4


def test_a_mean_over_different_budgets_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ("--tasks", "sst2", "--variants", "closed_form")
    assert _run(place, *chosen, "--seeds", "0") == 0
    assert _run(place, *chosen, "--seeds", "1", "--steps", "4") == 0
    assert main(["summary", "--output", str(place / "out")]) == 2
    assert "different models, steps or test rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "trivia"), "'trivia'"),
        (("--variants", "magic"), "'magic'"),
        (("--seeds", "x"), "--seeds"),
        (("--settings", "4,0.5"), "4,0.5"),
    ],
)
def test_wrong_options_are_named(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert _run(place, *arguments) == 2
    assert message in capsys.readouterr().err


def test_missing_data_is_named(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(place, "--data", str(tmp_path)) == 2
    assert "arc_easy/test.parquet" in capsys.readouterr().err


def test_plan_has_one_uniform_cell_per_alpha() -> None:
    triplets = [Triplet(4, 0.5, 0.8), Triplet(4, 0.5, 0.2)]
    planned = choices([TASKS["sst2"]], [0], ["closed_form", "uniform_drop"], triplets)
    assert [choice.variant for choice in planned] == ["closed_form", "uniform_drop", "closed_form"]
    assert planned[1].triplet == Triplet(4, 0.5, 0)
    with pytest.raises(ConfigError):
        Triplet.parse("a,b,c")


def test_variants_differ_in_what_they_say() -> None:
    found = {
        variant: Choice(TASKS["sst2"], 3, variant, Triplet(4, 0.5, 0.8))
        for variant in ("closed_form", "random_start", "paper")
    }
    closed, random, paper = (choice.stage_one(BUDGET, 64).model_dump() for choice in found.values())
    assert {key for key in closed if closed[key] != random[key]} == {"start"}
    assert {key for key in closed if closed[key] != paper[key]} == {
        *("activation", "start", "score_start", "objective", "generated_tokens")
    }
    assert closed["seed"] == 3
    assert found["random_start"].emulator(BUDGET) == found["closed_form"].emulator(BUDGET)
    assert found["closed_form"].emulator(BUDGET).fit_tokens == BUDGET.fit_tokens
    assert found["paper"].emulator(BUDGET).compression == "svd"
    assert found["paper"].emulator(BUDGET).fit_tokens == 0


def test_wikitext_articles_are_not_on_both_sides(tmp_path: Path) -> None:
    data = write_tiny_data(tmp_path / "data")
    train, test = prepare(TASKS["wikitext2"], data, tmp_path / "work", rows=4, block_size=32)
    tuned, measured = (
        [json.loads(line)["text"] for line in Path(part.path).read_text().splitlines()] for part in (train, test)
    )
    assert len(tuned) + len(measured) == 9
    assert not any(article.startswith(beginning) for article in tuned for beginning in measured)


def test_scores_survive_json() -> None:
    score = ChoiceScore(
        np.array([True, False]), np.array([True, True]), np.array([-1.5, -2.25]), np.array([-0.5, -1.25])
    )
    again = score_from(json.loads(json.dumps(score_record(score))))
    assert again.value == score.value
    assert again.blocks("log_likelihood").mean == score.mean_log_likelihood


def _loss(sums: list[float]) -> Measured:
    return Measured("loss", {"loss": Blocks(np.array(sums), np.full(len(sums), 10), higher_is_better=False)})


def test_gain_only_where_the_denominator_is_clear() -> None:
    rows = {row: _loss([40.0, 41, 42, 43, 44, 45]) for row in ROWS}
    assert not describe(rows)["loss"]["gain"]["usable"]
    rows["full_tuned"] = _loss([30.0, 31, 32, 33, 34, 35])
    rows["plug_in"] = _loss([35.0, 36, 37, 38, 39, 40])
    found = describe(rows)["loss"]
    assert found["gain"]["value"] == pytest.approx(0.5)
    assert found["differences"]["plug_in - full_zero_shot"]["value"] == pytest.approx(-0.5)


def test_mean_over_seeds_is_row_by_row() -> None:
    mean = mean_over_seeds([_loss([10.0, 20]), _loss([30.0, 40])])
    assert mean.blocks("loss").sums.tolist() == [20.0, 30.0]
    other = Measured("loss", {"loss": Blocks(np.array([1.0]), np.array([7]), higher_is_better=False)})
    with pytest.raises(DataError):
        mean_over_seeds([_loss([10.0, 20]), other])
