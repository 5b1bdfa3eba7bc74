"""The standard table as JSON: rows, Δ, G, and rows that are missing or known as numbers only."""

from __future__ import annotations

import json

import numpy as np
import pytest

from scaleot_ray.evaluation.choice import ChoiceScore
from scaleot_ray.evaluation.loss import LossScore
from scaleot_ray.evaluation.score import ReportedScore, Score
from scaleot_ray.evaluation.table import ROWS, TenantTable, recovered_gain, table_json

TEXT = np.random.default_rng(0).normal(3.0, 1.0, 100)
LEVELS = dict(zip(ROWS, (0.0, 1.5, 0.4, -0.2, -0.5), strict=True))  # loss above full zero-shot


def _loss_table(**rows: Score | None) -> TenantTable:
    counts = np.full(100, 127)
    scores: dict[str, Score | None] = {row: LossScore((TEXT + level) * counts, counts) for row, level in LEVELS.items()}
    return TenantTable("alice", "loss", {**scores, **rows})


def _choice_table() -> TenantTable:
    draw = np.random.default_rng(1).random(400)
    shares = dict(zip(ROWS, (0.4, 0.3, 0.5, 0.6, 0.8), strict=True))
    return TenantTable(
        "bob",
        "accuracy",
        {
            row: ChoiceScore(draw < share, draw < share / 2, np.log(draw) / (1 + share), np.log(draw) / (2 + share))
            for row, share in shares.items()
        },
    )


def test_a_loss_table() -> None:
    table = table_json(_loss_table())
    for row, level in LEVELS.items():
        assert table[row] == pytest.approx(TEXT.mean() + level)
    assert list(table)[:7] == ["name", "metric", *ROWS]
    assert (table["name"], table["metric"], table["blocks"]) == ("alice", "loss", 100)
    assert table["delta"] == pytest.approx(-0.6)
    assert table["delta_interval"] == pytest.approx([-0.6, -0.6])
    assert table["gain"]["value"] == pytest.approx(0.4)
    assert table["gain"]["usable"] is True
    assert set(table["gain"]) == {"value", "low", "high", "usable", "reason"}
    assert json.loads(json.dumps(table, allow_nan=False)) == table


def test_a_choice_table_has_the_normalised_accuracy_and_the_log_likelihood_beside() -> None:
    table = table_json(_choice_table())
    draw = np.random.default_rng(1).random(400)
    assert table["metric"] == "accuracy"
    assert table["plug_in"] == (draw < 0.6).mean()
    assert table["normalised"]["plug_in"] == (draw < 0.3).mean()
    assert table["log_likelihood"]["full_tuned"] == pytest.approx(np.log(draw).mean() / 1.8)
    assert table["log_probability"]["full_tuned"] == pytest.approx(np.log(draw).mean() / 2.8)
    for section in (table, table["normalised"], table["log_likelihood"], table["log_probability"]):
        assert section["delta"] == pytest.approx(section["plug_in"] - section["emulator_tuned"])
        assert section["delta_interval"][0] < section["delta"] < section["delta_interval"][1]
        gain = (section["plug_in"] - section["full_zero_shot"]) / (section["full_tuned"] - section["full_zero_shot"])
        assert section["gain"]["value"] == pytest.approx(gain)
        assert section["gain"]["low"] < gain < section["gain"]["high"]
    # Paired log-likelihoods are far less noisy than accuracies.
    widths = [section["gain"]["high"] - section["gain"]["low"] for section in (table, table["log_likelihood"])]
    assert widths[1] < widths[0] / 2
    json.dumps(table, allow_nan=False)


def test_rows_that_were_not_measured_stay_empty() -> None:
    table = table_json(_loss_table(full_tuned=None, emulator_tuned=None))
    assert table["full_tuned"] is None
    assert table["delta"] is None
    assert table["delta_interval"] is None
    assert table["gain"] == {
        "value": None,
        "low": None,
        "high": None,
        "usable": False,
        "reason": "full_tuned was not measured.",
    }
    empty = table_json(TenantTable("carol", "loss"))
    assert [empty[row] for row in ROWS] == [None] * 5
    assert empty["blocks"] is None
    json.dumps(empty, allow_nan=False)


def test_a_number_another_party_reports_is_shown_without_an_interval() -> None:
    table = table_json(_loss_table(emulator_tuned=ReportedScore("loss", 3.5)))
    assert table["emulator_tuned"] == 3.5
    assert table["delta"] == pytest.approx(TEXT.mean() - 0.2 - 3.5)
    assert table["delta_interval"] is None
    assert table["gain"]["usable"]
    reported = _loss_table(plug_in=ReportedScore("loss", 2.8))
    gain = recovered_gain(reported)
    assert not gain.usable
    assert gain.reason is not None
    assert "plug_in is known as a number only" in gain.reason


def test_numbers_of_further_measures_are_shown_too() -> None:
    rows = dict(_choice_table().rows)
    rows["emulator_zero_shot"] = ReportedScore("accuracy", 0.25, {"normalised": 0.125, "log_likelihood": -2.5})
    rows["emulator_tuned"] = ReportedScore("accuracy", 0.5, {"log_likelihood": -1.5})
    table = table_json(TenantTable("bob", "accuracy", rows))
    assert (table["emulator_zero_shot"], table["emulator_tuned"]) == (0.25, 0.5)
    assert (table["normalised"]["emulator_zero_shot"], table["normalised"]["emulator_tuned"]) == (0.125, None)
    likelihood = table["log_likelihood"]
    assert (likelihood["emulator_zero_shot"], likelihood["emulator_tuned"]) == (-2.5, -1.5)
    assert likelihood["delta"] == pytest.approx(likelihood["plug_in"] + 1.5)
    assert likelihood["delta_interval"] is None
    assert table["normalised"]["delta"] is None


def test_a_loss_has_its_perplexity() -> None:
    table = table_json(_loss_table(emulator_tuned=ReportedScore("loss", 1000.0), full_tuned=None))
    assert table["perplexity"]["plug_in"] == pytest.approx(np.exp(table["plug_in"]))
    # Beyond what a number holds, and not measured.
    assert (table["perplexity"]["emulator_tuned"], table["perplexity"]["full_tuned"]) == (None, None)
    assert list(table["perplexity"]) == list(ROWS)
    json.dumps(table, allow_nan=False)
    assert "perplexity" not in table_json(_choice_table())


def test_the_seed_and_the_number_of_samples_are_the_callers() -> None:
    table = _choice_table()
    assert recovered_gain(table, seed=1) == recovered_gain(table, seed=1)
    assert recovered_gain(table, seed=1) != recovered_gain(table, seed=2)
    assert recovered_gain(table, measure="log_likelihood").value != recovered_gain(table).value


def test_a_table_takes_its_own_rows_and_metric_only() -> None:
    with pytest.raises(ValueError, match="full_fine_tuned"):
        TenantTable("alice", "loss", {"full_fine_tuned": None})
    with pytest.raises(ValueError, match="accuracy"):
        TenantTable("alice", "loss", {"plug_in": ReportedScore("accuracy", 0.5)})
