"""build → tune → eval → plug → inspect on a tiny model, as commands and as jobs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from scaleot_ray.artifacts.audit import AuditLog
from tests.cli.command import Warm
from tests.cli.conftest import BUILD, TUNE
from tests.cli.test_documents import undocumented

ROWS = ("full_zero_shot", "emulator_zero_shot", "emulator_tuned", "plug_in", "full_tuned")


def test_build_reports_the_emulator(place: Path) -> None:
    document = json.loads((place / "build.json").read_text())
    assert document["schema"] == "scaleot.build/1"
    assert document["directory"] == "emulator"
    artifact = document["artifact"]
    assert (artifact["alpha"], artifact["beta"], artifact["plug_in_layers"]) == (0.5, 0.5, 2)
    assert artifact["layers_by_role"] == {"plug_in": 2, "kept": 3, "replaced": 3, "dropped": 0}
    assert 0 < artifact["verbatim_share"] < 1
    assert document["reused_stage_one"] is False
    progress = (place / "build.err").read_text()
    assert "stage 1: 4/4" in progress
    assert "it/s" not in progress  # no library's own bars


def test_the_same_build_again_is_found_done(place: Path, warm: Warm) -> None:
    arguments = ["build", "--model", "model", "--public", "public.jsonl", "--plug-in-layers", 2, "--beta", 0.5, *BUILD]
    again = warm.scaleot(*arguments, "--output", "emulator", "--alpha", 0.5, "--format", "json", cwd=place)
    assert again.code == 0, again.err
    assert again.json["artifact"] == json.loads((place / "build.json").read_text())["artifact"]

    other = warm.scaleot(*arguments, "--output", "emulator", "--alpha", 0.25, cwd=place)
    assert other.code == 2
    assert "--overwrite" in other.err

    quarter = warm.scaleot(
        *(*arguments, "--output", "quarter", "--cache", "emulator-cache", "--alpha", 0.25, "--format", "json"),
        cwd=place,
    )
    assert quarter.json["reused_stage_one"] is True
    assert "stage 1:" not in quarter.err


def test_public_text_may_be_in_another_column(place: Path, tmp_path: Path, warm: Warm) -> None:
    rows = [json.loads(line) for line in (place / "public.jsonl").read_text().splitlines()]
    renamed = tmp_path / "public.jsonl"
    renamed.write_text("".join(json.dumps({"content": row["text"]}) + "\n" for row in rows))
    arguments = ["build", "--model", "model", "--public", renamed, "--output", tmp_path / "out", "--plug-in-layers", 2]

    refused = warm.scaleot(*arguments, *BUILD, cwd=place)
    assert refused.code == 2
    assert "'content'" in refused.err  # the columns there are
    assert "--column text=COLUMN" in refused.err
    assert not (tmp_path / "out").exists()

    built = warm.scaleot(*arguments, "--column", "text=content", *BUILD, cwd=place)
    assert built.code == 0, built.err


def test_tune_reports_the_delta(place: Path) -> None:
    document = json.loads((place / "tune.json").read_text())
    assert document["schema"] == "scaleot.tune/1"
    assert set(document["metrics"]) == {"emulator_zero_shot", "emulator_tuned"}
    assert (place / "tuned" / "delta" / "manifest.json").exists()
    assert document["delta"]["bytes"] > 0


def test_a_data_owner_needs_the_emulator_only(place: Path, tmp_path: Path, warm: Warm) -> None:
    shutil.copytree(place / "emulator", tmp_path / "emulator")
    shutil.copy(place / "train.jsonl", tmp_path)
    done = warm.scaleot(
        "tune", "--emulator", "emulator", "--train", "train.jsonl", "--output", "tuned", *TUNE, cwd=tmp_path
    )
    assert done.code == 0, done.err
    assert "tuned layers in" in done.out
    assert "tuned/delta" in done.out


def test_early_stopping_on_a_part_of_the_training_rows(place: Path, tmp_path: Path, warm: Warm) -> None:
    arguments = ["tune", "--emulator", place / "emulator", "--train", place / "train.jsonl", *TUNE]
    every = ["--set", "tune.evaluate_every=2", "--set", "tune.patience=1", "--format", "json"]
    done = warm.scaleot(*arguments, *every, "--output", "tuned", cwd=tmp_path)
    assert done.code == 0, done.err
    assert [evaluation["step"] for evaluation in done.json["validation"]] == [2, 4][: len(done.json["validation"])]
    assert all(evaluation["loss"] > 0 for evaluation in done.json["validation"])
    assert done.json["steps"] in (2, 4)
    assert undocumented(done.json) == set()

    shown = warm.scaleot(
        *arguments, *every[:2], "--validation", place / "test.jsonl", "--output", "other", cwd=tmp_path
    )
    assert "validation loss" in shown.out
    assert "without tune.patience the last weights are taken" in shown.out

    unused = warm.scaleot(*arguments, "--validation", place / "test.jsonl", "--output", "unused", cwd=tmp_path)
    assert unused.code == 2
    assert "tune.evaluate_every" in unused.err

    few = warm.scaleot(*arguments, *every, "--set", "tune.validation_fraction=0.001", "--output", "few", cwd=tmp_path)
    assert (few.code, few.error["type"]) == (2, "DataError")
    assert "tune.validation_fraction" in few.error["message"]
    assert "--validation FILE" in few.error["remedy"]


def test_a_privacy_level_beside_alpha_is_refused(place: Path, warm: Warm) -> None:
    done = warm.scaleot(
        *("build", "--model", "model", "--public", "public.jsonl", "--output", "beside", "--privacy", "low"),
        *("--beta", 0.5, "--format", "json"),
        cwd=place,
    )
    assert (done.code, done.error["type"]) == (2, "ConfigError")
    assert "privacy=low chooses alpha and beta, but beta is given too" in done.error["message"]
    assert not (place / "beside").exists()


class TestEval:
    def test_all_rows(self, place: Path, warm: Warm) -> None:
        done = warm.scaleot(
            *("eval", "--model", "model", "--emulator", "emulator", "--delta", "tuned/delta", "--test", "test.jsonl"),
            *("--train", "train.jsonl", "--set", "block_size=32", "--set", "tune.method=lora", *TUNE),
            *("--format", "json"),
            cwd=place,
        )
        document = done.json
        assert document["schema"] == "scaleot.eval/1"
        assert document["metric"] == "loss"
        assert all(isinstance(document[row], float) for row in ROWS)
        assert document["delta"] == pytest.approx(document["plug_in"] - document["emulator_tuned"])
        assert set(document["gain"]) == {"value", "low", "high", "usable", "reason"}
        # The data owner measured the same two rows on the same test rows.
        metrics = json.loads((place / "tune.json").read_text())["metrics"]
        assert {row: document[row] for row in metrics} == pytest.approx(metrics)

    def test_rows_without_inputs_are_null(self, place: Path, warm: Warm) -> None:
        done = warm.scaleot(
            *("eval", "--model", "model", "--test", "choice.jsonl", "--task", "choice", "--column", "prompt=question"),
            *("--set", "block_size=32", "--format", "json"),
            cwd=place,
        )
        document = done.json
        assert document["metric"] == "accuracy"
        assert 0 <= document["full_zero_shot"] <= 1
        assert [document[row] for row in ROWS[1:]] == [None] * 4
        assert document["log_likelihood"]["full_zero_shot"] < 0

    def test_a_chosen_row_as_a_table(self, place: Path, warm: Warm) -> None:
        done = warm.scaleot(
            *("eval", "--model", "model", "--emulator", "emulator", "--test", "test.jsonl", "--set", "block_size=32"),
            *("--rows", "emulator_zero_shot"),
            cwd=place,
        )
        assert done.code == 0
        assert "emulator zero-shot" in done.out
        assert "full zero-shot" not in done.out
        assert "(perplexity)" in done.out

    def test_a_folder_that_cannot_be_written_is_said_before_a_row_is_measured(self, place: Path, warm: Warm) -> None:
        arguments = ["eval", "--model", "model", "--test", "test.jsonl", "--set", "block_size=32"]
        done = warm.scaleot(*arguments, "--folder", "test.jsonl", "--format", "json", cwd=place)
        assert (done.code, done.error["type"]) == (2, "ConfigError")
        assert done.error["message"].startswith("folder: test.jsonl cannot be written")
        assert "full zero shot" not in done.err

        done = warm.scaleot(*arguments, "--folder", "kept", cwd=place)
        assert done.code == 0, done.err
        assert [path.name for path in (place / "kept").iterdir()] == ["full_zero_shot.json"]

        shutil.copy(place / "test.jsonl", place / "kept")
        done = warm.scaleot(
            *arguments, "--set", "folder=null", "--set", f"test.path={place}/kept/test.jsonl", cwd=place
        )
        assert done.code == 0, done.err
        assert "full zero shot" in done.err

    def test_a_mistyped_dataset_leaves_nothing_behind(self, place: Path, tmp_path: Path, warm: Warm) -> None:
        done = warm.scaleot("eval", "--model", place / "model", "--test", "none.jsonl", cwd=tmp_path)
        assert done.code == 2
        assert list(tmp_path.iterdir()) == []


class TestPlug:
    def test_checkpoint(self, place: Path, tmp_path: Path, warm: Warm) -> None:
        done = warm.scaleot(
            *(
                "plug",
                "--model",
                "model",
                "--emulator",
                "emulator",
                "--delta",
                "tuned/delta",
                "--output",
                tmp_path / "m",
            ),
            *("--format", "json"),
            cwd=place,
        )
        assert done.json["form"] == "checkpoint"
        assert (tmp_path / "m" / "config.json").exists()
        loss = warm.scaleot(
            *("eval", "--model", tmp_path / "m", "--test", "test.jsonl", "--set", "block_size=32", "--format", "json"),
            cwd=place,
        )
        plugged = warm.scaleot(
            *("eval", "--model", "model", "--emulator", "emulator", "--delta", "tuned/delta", "--test", "test.jsonl"),
            *("--rows", "plug_in", "--set", "block_size=32", "--format", "json"),
            cwd=place,
        )
        assert loss.json["full_zero_shot"] == pytest.approx(plugged.json["plug_in"], abs=1e-5)

    def test_adapter(self, place: Path, tmp_path: Path, warm: Warm) -> None:
        done = warm.scaleot(
            *(
                "plug",
                "--model",
                "model",
                "--emulator",
                "emulator",
                "--delta",
                "tuned/delta",
                "--output",
                tmp_path / "a",
            ),
            "--adapter",
            cwd=place,
        )
        assert done.code == 0, done.err
        assert done.out.startswith("PEFT adapter written to")
        assert (tmp_path / "a" / "adapter_config.json").exists()

    def test_scale_must_be_a_number(self, place: Path, warm: Warm) -> None:
        done = warm.scaleot(
            *("plug", "--model", "model", "--emulator", "emulator", "--delta", "tuned/delta", "--output", "x"),
            *("--set", "scale=much"),
            cwd=place,
        )
        assert done.code == 2
        assert "scaleot plug: scale: " in done.err


class TestInspect:
    def test_emulator(self, place: Path, warm: Warm) -> None:
        done = warm.scaleot("inspect", "emulator", cwd=place)
        assert done.code == 0
        for words in ("kind", "2 plug-in layers (ends), α 0.5, β 0.5", "unchanged", "replaced by a harmonizer", "card"):
            assert words in done.out

    @pytest.mark.parametrize(
        ("folder", "kind"), [("emulator", "emulator"), ("tuned/delta", "delta"), ("tuned/metrics", "metrics")]
    )
    def test_json(self, place: Path, folder: str, kind: str, warm: Warm) -> None:
        document = warm.scaleot("inspect", folder, "--format", "json", cwd=place).json
        assert document["schema"] == "scaleot.inspect/1"
        assert document["artifact"]["kind"] == kind
        assert document["card"].startswith(f"# {kind.capitalize()} for `model`\n")
        assert (document["artifact"]["base_model"], document["artifact"]["licence"][:7]) == ("model", "unknown")

    def test_an_audit_log(self, place: Path, warm: Warm) -> None:
        done = warm.scaleot("inspect", "tuned/audit.jsonl", cwd=place)
        assert done.code == 0
        assert all(words in done.out for words in ("emulator", "delta", "metrics", "received", "none missing"))
        lines = (place / "tuned" / "audit.jsonl").read_bytes().splitlines(keepends=True)
        (place / "shorter.jsonl").write_bytes(b"".join([lines[0], *lines[2:]]))
        done = warm.scaleot("inspect", "shorter.jsonl", cwd=place)
        assert (done.code, done.out) == (3, "")
        assert "shorter.jsonl: lines are missing or altered before line 2" in done.err

    def test_another_file_is_no_audit_log(self, place: Path, warm: Warm) -> None:
        done = warm.scaleot("inspect", "model/config.json", cwd=place)
        assert done.code == 3
        assert "model/config.json: is no audit log" in done.err

    @pytest.mark.parametrize(
        ("change", "problem"),
        [
            ({"bytes": "x"}, "crossing 2 has a wrong value of 'bytes'"),
            ({"bytes": 10**400}, "crossing 2 has a wrong value of 'bytes'"),
            ({"digest": 3, "reason": ["x"]}, "crossing 2 has a wrong value of 'digest', 'reason'"),
            (b"", "is no audit log."),
            (b"text\n" * 100, "is no audit log."),
            (b'{"decision":' + b"[" * 100_000, "is no audit log."),
            (b'"decision"' + b" " * (2 << 20), "has a line of more than"),
        ],
    )
    def test_another_partys_log_may_hold_anything(
        self, change: bytes | dict[str, object], problem: str, tmp_path: Path, warm: Warm
    ) -> None:
        path = tmp_path / "audit.jsonl"
        if isinstance(change, bytes):
            path.write_bytes(change)
        else:
            log = AuditLog(path)
            log.record("ann", "model owner", "delta", 10, "0" * 64)
            log.record(**{"sender": "ann", "recipient": "ben", "kind": "delta", "bytes": 1, "digest": "0"} | change)
        done = warm.scaleot("inspect", "audit.jsonl", cwd=tmp_path)
        assert (done.code, done.out) == (3, "")
        assert f"audit.jsonl: {'' if problem.startswith('is') else 'is no audit log: '}" in done.err
        assert problem in done.err

    def test_a_log_is_shown_as_text_whatever_its_words(self, tmp_path: Path, warm: Warm) -> None:
        AuditLog(tmp_path / "audit.jsonl").record("ann[/x]", "ben", "[/x] \x1b[2J", 0, "", "refused", "kind '[/x]'")
        done = warm.scaleot("inspect", "audit.jsonl", cwd=tmp_path)
        assert done.code == 0, done.err
        assert "ann[/x]" in done.out
        assert "\x1b" not in done.out

    @pytest.mark.parametrize("folder", ["tuned/delta", "tuned/metrics"])
    def test_small_artefacts_as_text(self, place: Path, folder: str, warm: Warm) -> None:
        done = warm.scaleot("inspect", folder, cwd=place)
        assert done.code == 0
        assert "digest" in done.out
