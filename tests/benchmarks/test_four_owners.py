"""``python -m benchmarks.four_owners`` on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.four_owners import OWNERS, main, run_settings
from scaleot_ray.errors import ConfigError, DataError
from tests.benchmarks.tiny_data import write_tiny_data
from tests.tiny_models import save_tiny

SMALL = (
    *("stage_one.steps=2", "stage_one.block_size=32", "stage_one.harmonizer_rank=8", "stage_one.start_tokens=512"),
    *("stage_one.generated_tokens=512", "emulator.fit_tokens=1024", "emulator.plug_in_layers=2"),
    *("tune.steps=2", "evaluate_examples=8", "owner_cpus=1"),
)


def test_every_data_owner_has_data_of_its_own(tmp_path: Path) -> None:
    model, data = str(save_tiny(tmp_path / "model")), write_tiny_data(tmp_path / "data")
    settings = run_settings(model, data, tmp_path / "out", 3, ["tune.method=lora", "aggregation.method=svd"])
    assert tuple(tenant.name for tenant in settings.tenants) == OWNERS
    assert len({tenant.train.path for tenant in settings.tenants}) == len(OWNERS)
    assert {settings.tune_of(tenant).method for tenant in settings.tenants} == {"lora"}
    assert max(settings.tune_of(tenant).block_size for tenant in settings.tenants) == 64  # the model's context
    assert (settings.rounds.count, settings.evaluator) == (3, True)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    model = str(save_tiny(tmp_path / "model"))
    with pytest.raises(DataError, match="wikitext2"):
        run_settings(model, tmp_path, tmp_path / "out", 2, [])
    with pytest.raises(ConfigError, match=r"tune\.stepz"):
        run_settings(model, write_tiny_data(tmp_path / "data"), tmp_path / "out", 2, ["tune.stepz=2"])


@pytest.mark.slow
@pytest.mark.usefixtures("connected_ray")
def test_own_plug_ins_and_the_aggregate_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = str(save_tiny(tmp_path / "model")), write_tiny_data(tmp_path / "data")
    arguments = ["--model", model, "--data", str(data), "--output", str(tmp_path / "out")]
    for item in SMALL:
        arguments += ["--set", item]
    assert main([*arguments, "--json", str(tmp_path / "four.json")]) == 0
    text = (tmp_path / "four.json").read_text()
    assert str(tmp_path) not in text
    report = json.loads(text)["report"]
    assert [len(one["submitted"]) for one in report["rounds"]] == [4, 4]
    for tenant in report["tenants"]:
        assert tenant["plug_in"] is not None
        assert tenant["aggregate"] is not None
    assert "aggregate of round 2 by mean" in capsys.readouterr().out
