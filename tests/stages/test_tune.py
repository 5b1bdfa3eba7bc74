"""Tuning as a whole step: what it writes, what it reuses, what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from scaleot_ray.artifacts.artifact import Artifact
from scaleot_ray.artifacts.audit import AuditLog
from scaleot_ray.artifacts.gate import check_crossing
from scaleot_ray.artifacts.storage import read_artifact, write_artifact
from scaleot_ray.config import DataSettings, TuneSettings
from scaleot_ray.data import HoldOut, open_rows
from scaleot_ray.errors import ArtifactRefused, ConfigError, DataError
from scaleot_ray.progress import Progress
from scaleot_ray.stages import tune as tune_stage
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


def test_a_later_round_begins_with_an_earlier_ones_delta(built: Built, tmp_path: Path) -> None:
    first = tuned(built, tmp_path / "first")
    audit = AuditLog(tmp_path / "audit.jsonl")
    second = tuned(built, tmp_path / "second", start=first.delta, audit=audit)
    assert second.delta.manifest.content.start == first.delta.digest
    assert f"beginning with delta `{first.delta.digest}`" in second.delta.files["README.md"].decode()
    assert second.metrics["emulator_tuned"] < first.metrics["emulator_tuned"]
    assert [line["decision"] for line in audit.read()] == ["sent", "sent"]
    assert tuned(built, tmp_path / "second", start=first.delta).delta.digest == second.delta.digest
    with pytest.raises(ConfigError, match="result of another tuning"):
        tuned(built, tmp_path / "second")


def test_a_later_round_reads_the_rows_that_follow(built: Built, tmp_path: Path) -> None:
    def losses(name: str, steps: int, earlier: int = 0) -> list[float]:
        told: list[Progress] = []
        # So small a rate changes nothing: a loss then says which rows it is of.
        tune = built.settings.tune.model_copy(update={"steps": steps, "learning_rate": 1e-12})
        tuned(built, tmp_path / name, tune=tune, earlier_steps=earlier, on_progress=told.append)
        return [one.loss for one in told if one.stage == "tune alice" and one.loss is not None]

    whole = losses("whole", 6)
    assert losses("first", 3) == pytest.approx(whole[:3], abs=1e-5)
    assert losses("second", 3, earlier=3) == pytest.approx(whole[3:], abs=1e-5)
    assert whole[3:] != pytest.approx(whole[:3], abs=1e-3)


def test_a_finished_tuning_that_may_not_leave_is_refused(built: Built, tmp_path: Path) -> None:
    audit = AuditLog(tmp_path / "audit.jsonl")
    delta = tuned(built, tmp_path / "out", audit=audit).delta
    more = delta.with_files({"README.md": delta.files["README.md"] + b"Row 17: Alice."})
    write_artifact(more, tmp_path / "out" / "delta", overwrite=True)
    record = json.loads((tmp_path / "out" / "tune.json").read_text())
    (tmp_path / "out" / "tune.json").write_text(json.dumps({**record, "delta": more.digest}))
    with pytest.raises(ArtifactRefused, match="says something else than the card"):
        tuned(built, tmp_path / "out", audit=audit)
    lines = [(line["sender"], line["kind"], line["decision"]) for line in audit.read()]
    assert lines == [
        ("data owner alice", "delta", "sent"),
        ("data owner alice", "metrics", "sent"),
        ("data owner alice", "delta", "refused"),
    ]


@pytest.mark.parametrize("change", ["settings", "rows"])
def test_another_result_is_not_overwritten_unasked(built: Built, tmp_path: Path, change: str) -> None:
    first = tuned(built, tmp_path)
    changes: dict[str, Any] = {"tune": built.settings.tune.model_copy(update={"steps": 3})}
    if change == "rows":
        changes = {"train": built.settings.tenants[1].train}
    with pytest.raises(ConfigError, match="result of another tuning"):
        tuned(built, tmp_path, **changes)
    assert tuned(built, tmp_path, overwrite=True, **changes).delta.digest != first.delta.digest


def test_what_is_no_result_is_never_overwritten_and_that_shows_early(built: Built, tmp_path: Path) -> None:
    (tmp_path / "delta").mkdir()
    (tmp_path / "delta" / "thesis.txt").write_text("years of work")
    heard: list[Progress] = []
    with pytest.raises(ConfigError, match=r"delta: exists and holds no manifest.json, so it is not overwritten"):
        tuned(built, tmp_path, overwrite=True, on_progress=heard.append)
    assert not heard
    assert (tmp_path / "delta" / "thesis.txt").exists()


def test_a_damaged_result_is_made_again(built: Built, tmp_path: Path) -> None:
    first = tuned(built, tmp_path)
    (tmp_path / "delta" / "tensors.safetensors").write_bytes(b"broken")
    assert tuned(built, tmp_path, overwrite=True).delta.digest == first.delta.digest
    assert isinstance(read_artifact(tmp_path / "delta"), Artifact)


@pytest.mark.parametrize("written", ["delta", "metrics"])
def test_stopped_while_writing_the_same_command_goes_on(
    built: Built, tmp_path: Path, written: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop_after(artifact: Artifact, directory: Path, overwrite: bool) -> Path:
        write_artifact(artifact, directory, overwrite=overwrite)
        if directory.name == written:
            raise Stopped
        return directory

    whole = tuned(built, tmp_path / "whole")
    monkeypatch.setattr(tune_stage, "write_artifact", stop_after)
    with pytest.raises(Stopped):
        tuned(built, tmp_path / "parts")
    monkeypatch.undo()
    assert (tmp_path / "parts" / written).exists()
    # What lies there is of this tuning alone; another one still has to be told to replace it.
    with pytest.raises(ConfigError, match="result of another tuning"):
        tuned(built, tmp_path / "parts", tune=built.settings.tune.model_copy(update={"steps": 3}))
    steps: list[Progress] = []
    again = tuned(built, tmp_path / "parts", on_progress=lambda p: steps.append(p) if p.stage == "tune alice" else None)
    assert (again.delta.digest, again.metrics) == (whole.delta.digest, whole.metrics)
    assert not steps
    heard: list[Progress] = []
    tuned(built, tmp_path / "parts", on_progress=heard.append)
    assert not heard


def test_foreign_artefacts_beside_a_record_are_kept(built: Built, tmp_path: Path) -> None:
    tuned(built, tmp_path / "mine")
    theirs = tuned(built, tmp_path / "theirs", tune=built.settings.tune.model_copy(update={"steps": 3}))
    shutil.rmtree(tmp_path / "mine" / "delta")
    shutil.copytree(tmp_path / "theirs" / "delta", tmp_path / "mine" / "delta")
    with pytest.raises(ConfigError, match="result of another tuning"):
        tuned(built, tmp_path / "mine")
    assert read_artifact(tmp_path / "mine" / "delta").digest == theirs.delta.digest


def test_a_result_of_another_version_is_not_taken(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned(built, tmp_path)
    monkeypatch.setattr(tune_stage, "__version__", "9.9.9")
    with pytest.raises(ConfigError, match="result of another tuning"):
        tuned(built, tmp_path)


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


def test_a_faulty_row_far_in_shows_before_the_first_step(built: Built, tmp_path: Path) -> None:
    path, short = tmp_path / "rows.jsonl", built.settings.tune.model_copy(update={"checkpoint_every": 1})
    rows = [json.dumps({"prompt": "the owner", "completion": "tunes"})] * 100
    path.write_text("\n".join([*rows, json.dumps({"prompt": "the owner", "completion": ""})]))
    train, heard = DataSettings(path=str(path), task="completion"), []
    with pytest.raises(DataError, match=r"^train: .*rows.jsonl, line 101: column 'completion' is empty"):
        tuned(built, tmp_path / "out", train=train, tune=short, test=None, on_progress=heard.append)
    assert not heard


def test_checkpoints_of_other_tunings_stay(built: Built, tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        if progress.stage == "tune alice" and progress.step == 3:
            raise Stopped

    often = built.settings.tune.model_copy(update={"checkpoint_every": 1})
    with pytest.raises(Stopped):
        tuned(built, tmp_path, tune=often, on_progress=stop)
    (left,) = (tmp_path / "checkpoint").iterdir()
    tuned(built, tmp_path, tune=often.model_copy(update={"learning_rate": 1e-4}))
    assert list((tmp_path / "checkpoint").iterdir()) == [left]


def test_multiple_choice_reports_accuracy_and_likelihood(built: Built, tmp_path: Path) -> None:
    rows = [{"question": "one of", "choices": ["the owner", "the data"], "label": index % 2} for index in range(8)]
    (tmp_path / "choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataSettings(path=str(tmp_path / "choice.jsonl"), task="choice", prompt_column="question")
    settings = built.settings.tune.model_copy(update={"steps": 6, "evaluate_every": 2, "patience": 1})
    result = tuned(built, tmp_path / "out", train=data, test=data, tune=settings)
    assert 0 <= result.metrics["emulator_tuned"] <= 1
    assert result.metrics["emulator_tuned.log_likelihood"] < 0


class TestValidation:
    """What tuning is judged on while it runs: never the test rows, whose loss is reported."""

    def settings(self, built: Built, **changes: Any) -> TuneSettings:
        """Steps large enough that other text gets worse at once, and the own text does not."""
        values = {"learning_rate": 5e-3, "evaluate_every": 2, "patience": 2, "validation_fraction": 0.2, **changes}
        return built.settings.tune.model_copy(update=values)

    def test_test_rows_select_nothing(self, built: Built, tmp_path: Path) -> None:
        alice, bob = built.settings.tenants
        settings = self.settings(built)
        results = {
            name: tuned(built, tmp_path / name, tune=settings, test=test)
            for name, test in {"none": None, "own": alice.test, "other": bob.test}.items()
        }
        digests = {result.delta.digest for result in results.values()}
        assert len(digests) == 1
        # Judged on the very rows it reports, it would have taken other weights.
        for test in (alice.test, bob.test):
            folder = tmp_path / Path(test.path).stem
            assert tuned(built, folder, tune=settings, test=test, validation=test).delta.digest not in digests
        other = tuned(built, tmp_path / "bob-test", tune=settings, test=bob.test, validation=bob.test)
        assert other.steps is not None
        assert other.steps < (results["other"].steps or 0)

    def test_the_best_weights_are_taken(self, built: Built, tmp_path: Path) -> None:
        bob = built.settings.tenants[1]
        found = tuned(built, tmp_path / "stopped", tune=self.settings(built), validation=bob.test)
        best, _ = min(found.validation, key=lambda evaluation: evaluation[1])
        assert best < (found.steps or 0) == found.validation[-1][0]
        schedule = {"steps": 20, "patience": None}  # the last weights, where nobody asks for the best ones
        last = tuned(built, tmp_path / "last", tune=self.settings(built, **schedule), validation=bob.test)
        assert last.steps == 20
        assert last.metrics["emulator_tuned"] < found.metrics["emulator_tuned"]
        assert last.validation[: len(found.validation)] == found.validation

    def test_the_part_is_kept_out_of_training(self, built: Built, tmp_path: Path) -> None:
        alice, settings = built.settings.tenants[0], self.settings(built)
        rows, hold_out = open_rows(alice.train), HoldOut(settings.validation_fraction, settings.seed)
        files = {}
        for name, part in {"train": hold_out.training(rows), "validation": hold_out.validation(rows)}.items():
            files[name] = alice.train.model_copy(update={"path": str(tmp_path / f"{name}.jsonl")})
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
        by_hand = tuned(built, tmp_path / "by_hand", tune=settings, **files)
        assert tuned(built, tmp_path / "drawn", tune=settings).delta.digest == by_hand.delta.digest
        # All of train.jsonl trained on, the same rows to judge by: something else.
        leaking = tuned(built, tmp_path / "leaking", tune=settings, validation=files["validation"])
        assert leaking.delta.digest != by_hand.delta.digest

    def test_interrupted_and_resumed_is_the_same_bit_for_bit(self, built: Built, tmp_path: Path) -> None:
        settings = self.settings(built, checkpoint_every=3, patience=9)
        whole = tuned(built, tmp_path / "whole", tune=settings)

        def stop_at_eight(progress: Progress) -> None:
            if progress.stage == "tune alice" and progress.step == 8:
                raise Stopped

        with pytest.raises(Stopped):
            tuned(built, tmp_path / "parts", tune=settings, on_progress=stop_at_eight)
        rest = tuned(built, tmp_path / "parts", tune=settings)
        assert (rest.delta.digest, rest.validation) == (whole.delta.digest, whole.validation)
        again = tuned(built, tmp_path / "parts", tune=settings)  # found finished
        assert (again.validation, again.steps) == (whole.validation, whole.steps)

    def test_other_validation_rows_are_another_result(self, built: Built, tmp_path: Path) -> None:
        alice, bob = built.settings.tenants
        settings = self.settings(built)
        tuned(built, tmp_path, tune=settings, validation=alice.test)
        with pytest.raises(ConfigError, match="result of another tuning"):
            tuned(built, tmp_path, tune=settings, validation=bob.test)

    def test_too_few_rows_to_hold_out(self, built: Built, tmp_path: Path) -> None:
        train = built.settings.tenants[0].train.model_copy(update={"max_examples": 2})
        settings = self.settings(built, validation_fraction=0.01)
        with pytest.raises(DataError, match=r"tune.validation_fraction: 0.01 of .* leaves none to evaluate") as caught:
            tuned(built, tmp_path, tune=settings, train=train)
        assert "--validation FILE" in caught.value.remedy
        assert list(tmp_path.iterdir()) == []

    def test_rows_that_nothing_evaluates_on(self, built: Built, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="validation: nothing evaluates on these rows"):
            tuned(built, tmp_path, validation=built.settings.tenants[0].test)


def test_blocks_beyond_the_context_are_refused(built: Built, tmp_path: Path) -> None:
    settings = built.settings.tune.model_copy(update={"block_size": 65})
    with pytest.raises(ConfigError, match=r"tune.block_size: 65"):
        tuned(built, tmp_path, tune=settings, test=None)
