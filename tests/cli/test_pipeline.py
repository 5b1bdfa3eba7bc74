"""build → tune → eval → plug → inspect on a tiny model, as commands and as jobs."""

from __future__ import annotations

import fcntl
import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml

from tests.cli.command import PROJECT, Finished, Warm, started
from tests.cli.conftest import BUILD, STAGE_ONE, TUNE, write_rows
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
        *("build", "--model", "model", "--public", "public.jsonl", "--output", "x", "--privacy", "low"),
        *("--beta", 0.5, "--format", "json"),
        cwd=place,
    )
    assert (done.code, done.error["type"]) == (2, "ConfigError")
    assert "privacy=low chooses alpha and beta, but beta is given too" in done.error["message"]
    assert not (place / "x").exists()


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

    @pytest.mark.parametrize("folder", ["tuned/delta", "tuned/metrics"])
    def test_small_artefacts_as_text(self, place: Path, folder: str, warm: Warm) -> None:
        done = warm.scaleot("inspect", folder, cwd=place)
        assert done.code == 0
        assert "digest" in done.out


class TestRefused:
    """Bad inputs deep in the work end as short errors too, and nothing is left half-written."""

    def test_corrupted_artefact(self, place: Path, tmp_path: Path, warm: Warm) -> None:
        shutil.copytree(place / "emulator", tmp_path / "emulator")
        data = bytearray((tmp_path / "emulator" / "tensors.safetensors").read_bytes())
        data[-5] ^= 255
        (tmp_path / "emulator" / "tensors.safetensors").write_bytes(data)
        shutil.copy(place / "train.jsonl", tmp_path)
        for arguments in (
            ["inspect", "emulator"],
            ["tune", "--emulator", "emulator", "--train", "train.jsonl", "--output", "tuned"],
        ):
            done = warm.scaleot(*arguments, "--format", "json", cwd=tmp_path)
            assert done.code == 3
            assert done.error["type"] == "ArtifactRefused"
            assert "tensor" in done.error["message"]
        assert [path.name for path in (tmp_path / "tuned").iterdir()] == ["audit.jsonl"]  # which says so

    def test_truncated_artefact(self, place: Path, tmp_path: Path, warm: Warm) -> None:
        shutil.copytree(place / "tuned" / "delta", tmp_path / "delta")
        path = tmp_path / "delta" / "tensors.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        done = warm.scaleot("inspect", "delta", "--format", "json", cwd=tmp_path)
        assert done.code == 3
        assert "tensors.safetensors" in done.error["message"]

    def test_artefact_of_another_kind(self, place: Path, warm: Warm) -> None:
        done = warm.scaleot("tune", "--emulator", "tuned/delta", "--train", "train.jsonl", "--output", "x", cwd=place)
        assert done.code == 3
        assert "emulator" in done.err

    def test_missing_data(self, place: Path, warm: Warm) -> None:
        done = warm.scaleot(
            "tune",
            "--emulator",
            "emulator",
            "--train",
            "none.jsonl",
            "--output",
            "untouched",
            "--format",
            "json",
            cwd=place,
        )
        assert (done.code, done.error["type"]) == (2, "DataError")
        assert "none.jsonl" in done.error["message"]
        assert not (place / "untouched").exists()

    def test_wrong_column(self, place: Path, warm: Warm) -> None:
        done = warm.scaleot(
            *("tune", "--emulator", "emulator", "--train", "train.jsonl", "--output", "x", "--column", "text=body"),
            *("--format", "json", *TUNE),
            cwd=place,
        )
        assert (done.code, done.error["type"]) == (2, "DataError")
        assert "'body'" in done.error["message"]
        assert "'text'" in done.error["message"]

    def test_empty_data(self, place: Path, tmp_path: Path, warm: Warm) -> None:
        (tmp_path / "empty.jsonl").write_text("")
        done = warm.scaleot(
            "tune", "--emulator", "emulator", "--train", tmp_path / "empty.jsonl", "--output", "x", *TUNE, cwd=place
        )
        assert done.code == 2
        assert "empty" in done.err

    def test_wrong_label(self, place: Path, tmp_path: Path, warm: Warm) -> None:
        write_rows(tmp_path / "c.jsonl", [{"prompt": "one", "choices": ["a", "b"], "label": 7}])
        done = warm.scaleot(
            "eval",
            "--model",
            "model",
            "--test",
            tmp_path / "c.jsonl",
            "--task",
            "choice",
            *("--set", "block_size=32"),
            cwd=place,
        )
        assert done.code == 2
        assert "label 7" in done.err

    def test_missing_model(self, place: Path, warm: Warm) -> None:
        done = warm.scaleot("eval", "--model", "./no-model", "--test", "test.jsonl", "--format", "json", cwd=place)
        assert done.code == 2
        assert "no-model" in done.error["message"]

    def test_too_many_plug_in_layers(self, place: Path, warm: Warm) -> None:
        done = warm.scaleot(
            *("build", "--model", "model", "--public", "public.jsonl", "--output", "untouched", "--plug-in-layers", 8),
            *(*BUILD, "--format", "json"),
            cwd=place,
        )
        assert done.code == 2
        assert "plug_in_layers" in done.error["message"]
        assert not (place / "untouched").exists()

    def test_an_emulator_that_hides_nothing(self, place: Path, warm: Warm) -> None:
        done = warm.scaleot(
            *("build", "--model", "model", "--public", "public.jsonl", "--output", "x", "--alpha", 0),
            *("--cache", "emulator-cache", *BUILD),
            cwd=place,
        )
        assert done.code == 2
        assert "emulator.alpha" in done.err

    def test_blocks_longer_than_the_context(self, place: Path, warm: Warm) -> None:
        done = warm.scaleot("tune", "--emulator", "emulator", "--train", "train.jsonl", "--output", "x", cwd=place)
        assert done.code == 2
        assert "tune.block_size" in done.err


Ready = Callable[["subprocess.Popen[str]"], list[str]]


def told(stage: str) -> Ready:
    """Waits until a command has told of a stage and worked on; what it has shown."""

    def wait(process: subprocess.Popen[str]) -> list[str]:
        assert process.stderr is not None
        shown = []
        for line in process.stderr:
            shown.append(line)
            if line.startswith(f"{stage}:"):
                time.sleep(1)
                break
        return shown

    return wait


def opened(path: Path) -> Ready:
    """Waits until a command has opened a file."""

    def wait(process: subprocess.Popen[str]) -> list[str]:
        while str(path) not in {file.path for file in psutil.Process(process.pid).open_files()}:
            assert process.poll() is None
            time.sleep(0.05)
        return []

    return wait


class TestInterrupted:
    """Ctrl-C, or SIGTERM from a scheduler: exit code 130, no process left, and the same command goes on."""

    def stopped(self, arguments: list[object], ready: Ready, number: signal.Signals, place: Path) -> None:
        with started(*arguments, cwd=place) as process:
            shown = ready(process)
            children = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(number)
            out, rest = process.communicate(timeout=60)
        assert process.returncode == 130, "".join([*shown, rest])
        assert psutil.wait_procs(children, timeout=5)[1] == []
        assert out == ""
        assert "Traceback" not in rest
        assert f"error: {arguments[0]} was interrupted." in rest
        assert "  → Run the same command again" in rest

    def goes_on(self, arguments: list[object], stage: str, place: Path, warm: Warm) -> Finished:
        done = warm.scaleot(*arguments, cwd=place)
        assert done.code == 0, done.err
        first = re.search(rf"^{stage}: (\d+)/", done.err, flags=re.M)
        assert first is not None
        assert int(first.group(1)) > 2, done.err
        return done

    def test_build(self, place: Path, warm: Warm) -> None:
        settings = [f"--set=stage_one.{item}" for item in (*STAGE_ONE[1:], "steps=400", "checkpoint_every=1")]
        arguments: list[object] = ["build", "--model=model", "--public=public.jsonl", "--output=late", *settings]
        self.stopped([*arguments, "--plug-in-layers=2"], told("stage 1"), signal.SIGINT, place)
        assert not (place / "late").exists()
        self.goes_on([*arguments, "--plug-in-layers=2"], "stage 1", place, warm)

    def test_tune(self, place: Path, warm: Warm) -> None:
        settings = ["--set=tune.block_size=32", "--set=tune.steps=400", "--set=tune.checkpoint_every=1"]
        arguments: list[object] = [
            "tune",
            "--emulator=emulator",
            "--train=train.jsonl",
            "--output=late-tuned",
            *settings,
        ]
        self.stopped(arguments, told("tune data owner"), signal.SIGTERM, place)
        assert not (place / "late-tuned" / "delta").exists()
        self.goes_on(arguments, "tune data owner", place, warm)

    def test_eval(self, place: Path, warm: Warm) -> None:
        settings = ["block_size=32", "tune.block_size=32", "tune.steps=400", "tune.checkpoint_every=1"]
        arguments: list[object] = ["eval", "--model=model", "--emulator=emulator", "--test=test.jsonl"]
        arguments += [
            "--train=train.jsonl",
            "--rows=full_zero_shot,full_tuned",
            *(f"--set={item}" for item in settings),
        ]
        self.stopped(arguments, told("tune full test"), signal.SIGINT, place)
        kept = [path.name for path in (place / "scaleot-runs" / "eval").iterdir()]
        assert [name for name in kept if name.startswith("full_tuned-") and name.endswith(".safetensors")]
        again = self.goes_on(arguments, "tune full test", place, warm)
        assert "full zero shot test" not in again.err  # it had been measured

    def test_plug(self, place: Path, warm: Warm) -> None:
        arguments: list[object] = ["plug", "--model=model", "--emulator=emulator", "--delta=tuned/delta"]
        arguments += ["--output=late-merged/model"]
        audit = place / "late-merged" / "audit.jsonl"
        audit.parent.mkdir()
        with audit.open("a") as log:
            fcntl.flock(log, fcntl.LOCK_EX)  # so that it gets so far and no further
            self.stopped(arguments, opened(audit), signal.SIGTERM, place)
        assert [path.name for path in audit.parent.iterdir()] == [audit.name]
        assert audit.read_bytes() == b""
        done = warm.scaleot(*arguments, cwd=place)
        assert done.code == 0, done.err
        assert (place / "late-merged" / "model" / "config.json").exists()


class TestJobs:
    """The scripts for ``ray job submit`` do the same from a YAML file."""

    def test_all_four(self, place: Path, tmp_path: Path, warm: Warm) -> None:
        model = {"path": str(place / "model")}
        documents = {}
        for script, settings in {
            "build_emulator": {
                "model": model,
                "public": {"path": str(place / "public.jsonl")},
                "stage_one": {"steps": 2, "block_size": 32, "harmonizer_rank": 8, "start_tokens": 512},
                "emulator": {"plug_in_layers": 2, "alpha": 0.5},
                "output": "emulator",
            },
            "tune": {
                "emulator": "emulator",
                "train": {"path": str(place / "train.jsonl")},
                "tune": {"steps": 2, "block_size": 32},
                "output": "tuned",
            },
            "evaluate": {
                "model": model,
                "emulator": "emulator",
                "delta": "tuned/delta",
                "test": {"path": str(place / "test.jsonl")},
                "block_size": 16,
            },
            "plug_in": {"model": model, "emulator": "emulator", "delta": "tuned/delta", "output": "merged"},
        }.items():
            (tmp_path / "job.yaml").write_text(yaml.safe_dump(settings))
            arguments = ["--set", "block_size=32"] if script == "evaluate" else []
            done = warm.run(PROJECT / "jobs" / f"{script}.py", "job.yaml", *arguments, "--format", "json", cwd=tmp_path)
            assert done.code == 0, done.err
            documents[script] = done.json
        schemas = [documents[script]["schema"] for script in documents]
        assert schemas == ["scaleot.build/1", "scaleot.tune/1", "scaleot.eval/1", "scaleot.plug/1"]
        assert documents["evaluate"]["plug_in"] > 0
        assert (tmp_path / "merged" / "config.json").exists()

    def test_a_wrong_file(self, tmp_path: Path, warm: Warm) -> None:
        (tmp_path / "job.yaml").write_text("emulater: x\n")
        done = warm.run(PROJECT / "jobs" / "tune.py", "job.yaml", "--format", "json", cwd=tmp_path)
        assert done.code == 2
        assert "'emulater'" in done.error["message"]

    @pytest.mark.parametrize("script", ["build_emulator", "tune", "plug_in", "evaluate", "federate"])
    def test_help(self, script: str, warm: Warm) -> None:
        done = warm.run(PROJECT / "jobs" / f"{script}.py", "--help", cwd=PROJECT)
        assert done.code == 0
        assert "ray job submit --working-dir jobs" in " ".join(done.out.split())
        assert "CONFIG.yaml" in done.out
