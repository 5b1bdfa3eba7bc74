"""``python -m benchmarks.utility`` on a tiny model: points, budgets in tokens, what counts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.utility.__main__ import main
from benchmarks.utility.measured import ALL_LAYERS
from benchmarks.utility.plan import BUDGETS, Point
from benchmarks.utility.runner import CellRunner
from benchmarks.utility.tasks import CHOICES_OF_77, TASKS, prepare, task_named
from scaleot_ray.config import EmulatorSettings, StageOneSettings, TuneSettings
from scaleot_ray.errors import ConfigError
from scaleot_ray.evaluation.table import ROWS
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


def test_cells_are_computed_once_and_summarised(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = ("--label", "plain", "--set", "emulator.builder=uniform_drop", "--set", "emulator.beta=0")
    assert _run(place, *plain, "--seeds", "0,1") == 0
    err = capsys.readouterr().err
    assert "tokens a tuning run" in err
    assert "[2/2]" in err
    files = [place / "out" / "cells" / f"arc_easy-seed{seed}-plain.json" for seed in (0, 1)]
    assert not list((place / "out" / "work").iterdir())
    uniform = json.loads(files[0].read_text())
    assert uniform["emulator"]["layers"] == {"dropped": 3, "kept": 3, "plug_in": 2}
    before = [path.stat().st_mtime_ns for path in files]
    # A second task in the same folder: its cell is computed, the others are skipped.
    assert _run(place, *plain, "--tasks", "arc_easy,wikitext2") == 0
    err = capsys.readouterr().err
    assert "arc_easy-seed0-plain: finished before" in err
    assert "wikitext2-seed0-plain: finished in" in err
    assert before == [path.stat().st_mtime_ns for path in files]

    assert main(["summary", "--output", str(place / "out"), "--json", str(place / "utility.json")]) == 0
    text = (place / "utility.json").read_text()
    document = json.loads(text)
    table = capsys.readouterr().out
    assert str(place) not in text + table
    assert any("--model model --data data --output out" in command for command in document["commands"])
    groups = {(entry["task"], entry["label"]): entry for entry in document["over_seeds"]}
    assert set(groups["arc_easy", "plain"]["seeds"]) == {"0", "1"}
    found = groups["arc_easy", "plain"]["measures"]["log_likelihood"]
    assert set(found["rows"]) == set(ROWS)
    assert set(found["gain"]["seeds"]) == {"0", "1"}
    row = found["rows"]["plug_in"]
    assert row["low"] <= row["value"] <= row["high"]
    assert groups["wikitext2", "plain"]["metric"] == "loss"
    assert "| arc_easy | plain | 2 |" in table
    assert "Log-likelihood of the right answer" in table


def test_other_settings_are_computed_again(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ("--tasks", "sst2", "--label", "other", "--set", "emulator.builder=uniform_drop")
    # What an interrupted cell left is no obstacle: the cell starts over.
    (place / "out" / "work" / "sst2-seed0-other" / "delta").mkdir(parents=True)
    assert _run(place, *chosen, "--set", "tune.steps=2", "--seeds", "0,1") == 0
    capsys.readouterr()
    assert _run(place, *chosen, "--set", "tune.steps=3") == 0
    assert "finished before" not in capsys.readouterr().err
    path = place / "out" / "cells" / "sst2-seed0-other.json"
    assert json.loads(path.read_text())["settings"]["tune"]["steps"] == 3


def test_cells_of_other_test_rows_have_no_mean(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ("--label", "seeds", "--set", "emulator.builder=uniform_drop", "--seeds", "0,1")
    assert _run(place, *chosen) == 0
    assert main(["summary", "--output", str(place / "out")]) == 0
    path = place / "out" / "cells" / "arc_easy-seed1-seeds.json"
    record = json.loads(path.read_text())
    record["of"]["test"] = "of other rows"
    path.write_text(json.dumps(record))
    capsys.readouterr()
    assert main(["summary", "--output", str(place / "out")]) == 2
    assert "different models, data, steps or test rows" in capsys.readouterr().err
    path.unlink()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "trivia"), "'trivia'"),
        (("--seeds", "x"), "--seeds"),
        (("--label", "../x"), "'../x'"),
        (("--set", "stage_one.seed=3"), "--set stage_one.seed"),
        (("--data", "not there"), "arc_easy/test.parquet"),
        (("--matmul-precision", "medium"), "was computed with highest, not medium"),
    ],
)
def test_wrong_options_are_named(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    (place / "out").mkdir(exist_ok=True)
    (place / "out" / "run.json").write_text('{"matmul_precision": "highest"}')
    assert _run(place, *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_point_needs_known_keys(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(place, "--set", "tune.stepz=3") == 2
    assert "steps" in capsys.readouterr().err
    assert _run(place, "--set", "stage_two.steps=3") == 2
    assert "stage_two" in capsys.readouterr().err
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


def test_wikitext_articles_are_not_on_both_sides(tmp_path: Path) -> None:
    data = write_tiny_data(tmp_path / "data")
    train, test = prepare(TASKS["wikitext2"], data, tmp_path / "work", rows=4, block_size=32)
    tuned, measured = (
        [json.loads(line)["text"] for line in Path(part.path).read_text().splitlines()] for part in (train, test)
    )
    assert len(tuned) + len(measured) == 9
    assert not any(article.startswith(beginning) for article in tuned for beginning in measured)


def test_banking_rows_hold_their_own_intent_once(tmp_path: Path) -> None:
    data = write_tiny_data(tmp_path / "data")
    for part in prepare(TASKS["banking77"], data, tmp_path / "work", rows=20, block_size=64):
        rows = [json.loads(line) for line in Path(part.path).read_text().splitlines()]
        assert rows
        for row in rows:
            assert row["choices"][row["label"]] == row["text"].replace("_", " ").rstrip("?")
            assert len(set(row["choices"])) == len(row["choices"]) == CHOICES_OF_77
