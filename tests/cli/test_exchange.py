"""Parties that exchange folders: build, tune and plug go through the same gate as a run, and write it down."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from scaleot_ray.artifacts.artifact import Artifact
from scaleot_ray.artifacts.audit import AuditLog
from scaleot_ray.artifacts.storage import read_artifact, write_artifact
from tests.cli.command import Warm
from tests.cli.conftest import BUILD, TUNE


def lines(path: Path) -> list[tuple[str, str, str, str]]:
    """Who sent what to whom, and what came of it."""
    entries = AuditLog(path).read()
    return [(entry["sender"], entry["recipient"], entry["kind"], entry["decision"]) for entry in entries]


@pytest.fixture(scope="module")
def open_emulator(place: Path, warm: Warm) -> Path:
    """An emulator that hides nothing, in a folder of its own."""
    folder = place / "experiment"
    folder.mkdir()
    done = warm.scaleot(
        *("build", "--model", "model", "--public", "public.jsonl", "--output", "experiment/open", "--alpha", 0),
        *("--set", "emulator.allow_unprotected=true", "--plug-in-layers", 2, "--cache", "emulator-cache", *BUILD),
        cwd=place,
    )
    assert done.code == 0, done.err
    assert "written to experiment/open for experiments; it must not be sent" in done.out
    assert "experiment/open must not be sent: this emulator hides nothing" in done.err
    return folder / "open"


def test_every_command_writes_its_crossings(place: Path, tmp_path: Path, warm: Warm) -> None:
    build = json.loads((place / "build.json").read_text())
    assert build["audit"] == str((place / "audit.jsonl").resolve())
    first = AuditLog(build["audit"]).read()[0]
    assert (first["sender"], first["recipient"], first["decision"]) == ("model owner", "data owners", "sent")
    assert first["digest"] == build["artifact"]["digest"]

    tune = json.loads((place / "tune.json").read_text())
    assert tune["audit"] == str((place / "tuned" / "audit.jsonl").resolve())
    assert lines(place / "tuned" / "audit.jsonl") == [
        ("model owner", "data owner", "emulator", "received"),
        ("data owner", "model owner", "delta", "sent"),
        ("data owner", "model owner", "metrics", "sent"),
    ]
    assert AuditLog(tune["audit"]).read()[1]["digest"] == tune["delta"]["digest"]

    plug = ["plug", "--model", place / "model", "--emulator", place / "emulator", "--delta", place / "tuned" / "delta"]
    done = warm.scaleot(*plug, "--name", "alice", "--output", "merged", "--format", "json", cwd=tmp_path)
    assert done.json["audit"] == str(tmp_path / "audit.jsonl")
    assert lines(tmp_path / "audit.jsonl") == [("data owner alice", "model owner", "delta", "received")]


def test_a_finished_tuning_passes_the_gate_again(place: Path, tmp_path: Path, warm: Warm) -> None:
    tune = ["tune", "--emulator", place / "emulator", "--train", place / "train.jsonl", "--output", "tuned", *TUNE]
    for _ in range(2):
        done = warm.scaleot(*tune, "--name", "bob", cwd=tmp_path)
        assert done.code == 0, done.err
    assert [line[2:] for line in lines(tmp_path / "tuned" / "audit.jsonl")] == 2 * [
        ("emulator", "received"),
        ("delta", "sent"),
        ("metrics", "sent"),
    ]


def test_an_emulator_that_hides_nothing_gets_no_line_and_is_not_tuned(
    place: Path, open_emulator: Path, tmp_path: Path, warm: Warm
) -> None:
    assert not (open_emulator.parent / "audit.jsonl").exists()
    done = warm.scaleot(
        *("tune", "--emulator", open_emulator, "--train", place / "train.jsonl", "--output", "tuned", *TUNE),
        *("--format", "json"),
        cwd=tmp_path,
    )
    assert (done.code, done.error["type"]) == (3, "ArtifactRefused")
    assert "hides nothing" in done.error["message"]
    assert lines(tmp_path / "tuned" / "audit.jsonl") == [("model owner", "data owner", "emulator", "refused")]
    assert [path.name for path in (tmp_path / "tuned").iterdir()] == ["audit.jsonl"]


def test_a_finished_emulator_that_passes_no_longer_is_refused(place: Path, tmp_path: Path, warm: Warm) -> None:
    arguments = [
        *("build", "--model", place / "model", "--public", place / "public.jsonl", "--output", "emulator"),
        *("--plug-in-layers", 2, "--alpha", 0.5, *BUILD),
    ]
    assert warm.scaleot(*arguments, cwd=tmp_path).code == 0
    artifact = read_artifact(tmp_path / "emulator")
    content = artifact.manifest.content.model_copy(update={"verbatim_parameters": 1})
    lie = Artifact(artifact.manifest.model_copy(update={"content": content}), artifact.tensors, artifact.files)
    write_artifact(lie, tmp_path / "emulator", overwrite=True)
    for record in (tmp_path / "emulator-cache").rglob("emulator-*.json"):
        values = json.loads(record.read_text())
        record.write_text(json.dumps({**values, "digest": lie.digest}))
    done = warm.scaleot(*arguments, cwd=tmp_path)
    assert done.code == 3, done.err
    assert "would leave verbatim" in done.err
    assert [line[3] for line in lines(tmp_path / "audit.jsonl")] == ["sent", "refused"]


@pytest.mark.parametrize("change", ["card", "file", "emulator"])
def test_a_delta_that_carries_more_or_belongs_elsewhere_is_refused(
    place: Path, open_emulator: Path, tmp_path: Path, warm: Warm, change: str
) -> None:
    delta = read_artifact(place / "tuned" / "delta")
    if change == "card":
        delta = delta.with_files({"README.md": delta.files["README.md"] + b"\nRow 17: Alice.\n"})
    write_artifact(delta, tmp_path / "delta")
    if change == "file":
        shutil.copy(place / "train.jsonl", tmp_path / "delta")
    emulator = open_emulator if change == "emulator" else place / "emulator"
    done = warm.scaleot(
        *("plug", "--model", place / "model", "--emulator", emulator, "--delta", "delta", "--output", "merged"),
        cwd=tmp_path,
    )
    assert done.code == 3, done.err
    expected = {"card": "says something else", "file": "'train.jsonl' is extra", "emulator": "was tuned on emulator"}
    assert expected[change] in done.err
    assert lines(tmp_path / "audit.jsonl") == [("data owner", "model owner", "delta", "refused")]
    assert not (tmp_path / "merged").exists()


def test_base_model_and_the_first_line_of_its_licence_are_shown(place: Path, tmp_path: Path, warm: Warm) -> None:
    done = warm.scaleot(
        *("build", "--model", place / "model", "--public", place / "public.jsonl", "--output", "emulator"),
        *("--plug-in-layers", 2, "--alpha", 0.5, "--cache", place / "emulator-cache", *BUILD),
        *("--set", r'model.licence="Apache-2.0, with a notice\n\nCopyright Somebody"'),
        cwd=tmp_path,
    )
    assert done.code == 0, done.err
    shown = {line.split("  ")[0]: line for line in done.out.splitlines()}
    assert shown["base model"].endswith("  model")
    assert shown["licence"].endswith("  Apache-2.0, with a notice …")
    tuned = warm.scaleot(
        "tune", "--emulator", "emulator", "--train", place / "train.jsonl", "--output", "tuned", *TUNE, cwd=tmp_path
    )
    assert tuned.code == 0, tuned.err
    for part in ("delta", "metrics"):
        card = read_artifact(tmp_path / "tuned" / part).files["README.md"].decode()
        assert "> Apache-2.0, with a notice\n>\n> Copyright Somebody\n" in card
