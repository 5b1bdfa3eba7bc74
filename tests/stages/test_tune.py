"""Tuning as a whole step: what it writes, what it reuses, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scaleot_ray.artifacts.artifact import Artifact
from scaleot_ray.artifacts.gate import check_crossing
from scaleot_ray.artifacts.storage import read_artifact
from scaleot_ray.config import DataSettings
from scaleot_ray.errors import ConfigError
from scaleot_ray.progress import Progress
from scaleot_ray.stages.tune import TuneResult, tune_emulator
from tests.stages.conftest import Built


class Stopped(Exception):
    """Stands for whatever ends a process."""


def tuned(built: Built, output: Path, **changes: Any) -> TuneResult:
    """Alice's tuning with some arguments changed."""
    alice = built.settings.tenants[0]
    arguments = {"train": alice.train, "tune": built.settings.tune, "name": "alice", "test": alice.test, **changes}
    return tune_emulator(built.emulator, output=output, device="cpu", evaluate_examples=16, **arguments)


def test_what_may_leave_passes_the_gate(built: Built, tmp_path: Path) -> None:
    result = tuned(built, tmp_path)
    for part in ("delta", "metrics"):
        check_crossing(read_artifact(tmp_path / part, expected_kind=part), parent=built.emulator.manifest)
    assert result.metrics["emulator_tuned"] < result.metrics["emulator_zero_shot"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["delta", "metrics", "tune.json"]


def test_a_finished_tuning_is_reused(built: Built, tmp_path: Path) -> None:
    first = tuned(built, tmp_path)
    heard: list[Progress] = []
    second = tuned(built, tmp_path, on_progress=heard.append)
    assert not heard
    assert (second.delta.digest, second.metrics) == (first.delta.digest, first.metrics)


@pytest.mark.parametrize("change", ["settings", "rows"])
def test_another_result_is_not_overwritten_unasked(built: Built, tmp_path: Path, change: str) -> None:
    first = tuned(built, tmp_path)
    changes: dict[str, Any] = {"tune": built.settings.tune.model_copy(update={"steps": 3})}
    if change == "rows":
        changes = {"train": built.settings.tenants[1].train}
    with pytest.raises(ConfigError, match="result of another tuning"):
        tuned(built, tmp_path, **changes)
    assert tuned(built, tmp_path, overwrite=True, **changes).delta.digest != first.delta.digest


def test_a_damaged_result_is_made_again(built: Built, tmp_path: Path) -> None:
    first = tuned(built, tmp_path)
    (tmp_path / "delta" / "tensors.safetensors").write_bytes(b"broken")
    assert tuned(built, tmp_path, overwrite=True).delta.digest == first.delta.digest
    assert isinstance(read_artifact(tmp_path / "delta"), Artifact)


def test_an_interrupted_tuning_ends_where_a_whole_one_does(built: Built, tmp_path: Path) -> None:
    whole = tuned(built, tmp_path / "whole")
    settings = built.settings.tune.model_copy(update={"checkpoint_every": 4})

    def stop_at_ten(progress: Progress) -> None:
        if progress.stage == "tune alice" and progress.step == 10:
            raise Stopped

    with pytest.raises(Stopped):
        tuned(built, tmp_path / "parts", tune=settings, on_progress=stop_at_ten)
    assert list((tmp_path / "parts" / "checkpoint").iterdir())
    steps: list[int] = []
    rest = tuned(
        built,
        tmp_path / "parts",
        tune=settings,
        on_progress=lambda progress: steps.append(progress.step) if progress.stage == "tune alice" else None,
    )
    assert steps[0] == 9
    assert rest.delta.digest == whole.delta.digest
    assert not (tmp_path / "parts" / "checkpoint").exists()


def test_multiple_choice_reports_accuracy_and_likelihood(built: Built, tmp_path: Path) -> None:
    rows = [{"question": "one of", "choices": ["the owner", "the data"], "label": index % 2} for index in range(8)]
    (tmp_path / "choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataSettings(path=str(tmp_path / "choice.jsonl"), task="choice", prompt_column="question")
    settings = built.settings.tune.model_copy(update={"steps": 6, "evaluate_every": 2, "patience": 1})
    result = tuned(built, tmp_path / "out", train=data, test=data, tune=settings)
    assert 0 <= result.metrics["emulator_tuned"] <= 1
    assert result.metrics["emulator_tuned.log_likelihood"] < 0


def test_early_stopping_without_test_rows_is_refused(built: Built, tmp_path: Path) -> None:
    settings = built.settings.tune.model_copy(update={"evaluate_every": 2})
    with pytest.raises(ConfigError, match=r"tune.evaluate_every"):
        tuned(built, tmp_path, tune=settings, test=None)


def test_blocks_beyond_the_context_are_refused(built: Built, tmp_path: Path) -> None:
    settings = built.settings.tune.model_copy(update={"block_size": 65})
    with pytest.raises(ConfigError, match=r"tune.block_size: 65"):
        tuned(built, tmp_path, tune=settings, test=None)
