"""What cells hold: scores that survive JSON, G and what makes it count, means over seeds."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from benchmarks.utility.measured import ALL_LAYERS, Measured, describe, mean_over_seeds, score_from, score_record
from benchmarks.utility.summary import markdown
from scaleot_ray.errors import DataError
from scaleot_ray.evaluation.choice import ChoiceScore
from scaleot_ray.evaluation.score import Blocks
from scaleot_ray.evaluation.table import ROWS


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
