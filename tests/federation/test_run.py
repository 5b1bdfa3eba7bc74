"""A whole run on a tiny model: the report, what crossed, what is reused, what goes wrong."""

from __future__ import annotations

import io
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from scaleot_ray.artifacts.audit import AuditLog
from scaleot_ray.artifacts.storage import read_artifact, read_manifest
from scaleot_ray.cli.tables import show_standard_table
from scaleot_ray.config import DataSettings, RunSettings, TuneSettings
from scaleot_ray.errors import ConfigError, DataError, RunFailed
from scaleot_ray.evaluation.table import ROWS
from scaleot_ray.federation.driver.phases import Phases
from scaleot_ray.federation.driver.report import RunReport
from scaleot_ray.federation.roles.role import ACTORS
from scaleot_ray.federation.run import run_local
from scaleot_ray.progress import Progress, TenantState
from scaleot_ray.resources.data_check import LOOKED_AT
from scaleot_ray.resources.processes import marked
from scaleot_ray.resources.session import Session
from tests.tiny_run import WORDS, write_text, write_tiny_run

pytestmark = pytest.mark.usefixtures("connected_ray")


class Run:
    """One run: its report, and the stages that it told of."""

    def __init__(self, settings: RunSettings) -> None:
        self.settings, self.heard, self.states = settings, list[Progress](), list[TenantState]()
        self.report: RunReport = run_local(settings, on_progress=self.heard.append, on_state=self.states.append)
        self.json: dict[str, Any] = self.report.as_json()
        # On a busy machine a process may be so long in coming that the run says whom it waits for.
        self.stages = {progress.stage for progress in self.heard if " waits for " not in progress.stage}


@pytest.fixture(scope="module")
def first(connected_ray: Session, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that others come back to."""
    return Run(write_tiny_run(tmp_path_factory.mktemp("run")))


def actors_left() -> list[str]:
    """Processes of living actors of ours."""
    kinds = ("ray::ModelOwner", "ray::DataOwner", "ray::Evaluator", "ray::Coordinator")
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            found += [line for line in process.cmdline()[:1] if line.startswith(kinds)]
        except psutil.Error:
            continue
    return found


def test_the_report(first: Run) -> None:
    report, folder = first.json, Path(first.settings.output)
    assert report["schema"] == "scaleot.run/1"
    assert json.loads((folder / "report.json").read_text()) == report
    assert {"total", "start", "load", "stage_one", "emulator", "tune", "evaluate"} == report["seconds"].keys()
    assert report["seconds"]["total"] > report["seconds"]["tune"] > 0
    assert report["peak_rss_bytes"] > 500 << 20
    emulator = report["emulator"]
    assert emulator["replaced_layers"] == [
        index for index, role in enumerate(emulator["layer_map"]) if role == "replaced"
    ]
    assert len(emulator["replaced_layers"]) == 3
    assert (emulator["alpha"], emulator["beta"], emulator["plug_in_layers"]) == (0.5, 0.8, 2)
    assert 0 < emulator["bytes"] < emulator["full_bytes"]
    assert 0 < emulator["verbatim_share"] < 1
    assert isinstance(emulator["loss_margin"], float)
    assert [tenant["name"] for tenant in report["tenants"]] == ["alice", "bob"]
    for tenant in report["tenants"]:
        assert tenant["metric"] == "loss"
        assert all(tenant[row] > 0 for row in ROWS)
        assert tenant["full_tuned"] < tenant["full_zero_shot"]
        assert tenant["emulator_tuned"] < tenant["emulator_zero_shot"]
        assert tenant["delta"] == pytest.approx(tenant["plug_in"] - tenant["emulator_tuned"])
        # Paired: the evaluator measures the tuned emulator too, on the blocks the plug-in is measured on.
        assert tenant["delta_interval"][0] <= tenant["delta"] <= tenant["delta_interval"][1]
        sent = read_manifest(folder / "tenants" / tenant["name"] / "metrics").content.values
        assert tenant["emulator_tuned"] == pytest.approx(sent["emulator_tuned"], rel=1e-5)
        assert tenant["emulator_zero_shot"] == sent["emulator_zero_shot"]
        assert tenant["perplexity"]["plug_in"] == pytest.approx(math.exp(tenant["plug_in"]))
        assert tenant["gain"]["usable"]
        assert tenant["gain"]["low"] <= tenant["gain"]["value"] <= tenant["gain"]["high"]
        manifest = read_manifest(folder / "tenants" / tenant["name"] / "delta")
        assert (tenant["delta_bytes"], tenant["delta_digest"]) == (manifest.nbytes, manifest.digest())
        assert manifest.parent_digest == emulator["digest"]


def test_artefacts_on_disk_are_whole_and_have_cards(first: Run) -> None:
    folder = Path(first.settings.output)
    for path in ("emulator", "tenants/alice/delta", "tenants/bob/delta", "tenants/alice/metrics"):
        card = read_artifact(folder / path).files["README.md"].decode()
        assert "Base model: `model`" in card
        assert "> unknown (the model names no licence)" in card


def test_the_audit_log_has_every_crossing(first: Run) -> None:
    lines = AuditLog(first.json["audit"]).read()
    crossed = {(line["sender"], line["recipient"], line["kind"]) for line in lines}
    for name in ("alice", "bob"):
        assert {
            ("model owner", f"data owner {name}", "emulator"),
            (f"data owner {name}", "model owner", "delta"),
            (f"data owner {name}", "model owner", "metrics"),
            # With a declared evaluator both secrets meet, and the log says so.
            ("model owner", f"evaluator {name}", "emulator"),
            ("model owner", f"evaluator {name}", "full model"),
            (f"data owner {name}", f"evaluator {name}", "rows"),
            ("model owner", f"evaluator {name}", "delta"),
            (f"evaluator {name}", "driver", "table"),
        } <= crossed
    assert len(crossed) == 16
    assert all(line["decision"] == "sent" for line in lines)


def test_progress_comes_from_all_actors(first: Run) -> None:
    both = {f"{stage} {name}" for stage in ("tune", "tune full", "plug in", "full tuned") for name in ("alice", "bob")}
    assert {"stage 1", *both} <= first.stages
    for stage in both:
        last = [progress for progress in first.heard if progress.stage == stage][-1]
        assert last.step == last.steps
        name = stage.rpartition(" ")[2]
        assert (last.tenant, last.round) == (name, 1 if stage == f"tune {name}" else None)
    for name in ("alice", "bob"):
        told = [told.state for told in first.states if told.tenant == name]
        assert {"waiting", "tuning", "submitted", "measuring"} <= set(told)
        assert told[-1] == "measured"


def test_no_private_path_is_in_what_left(first: Run) -> None:
    folder = Path(first.settings.output)
    for part in (folder / "audit.jsonl", *(folder / "emulator").iterdir(), *folder.glob("tenants/*/*/*.json")):
        text = part.read_bytes()
        assert b"alice-train" not in text
        assert str(folder.parent).encode() not in text


def test_a_second_run_reuses_everything(first: Run) -> None:
    second = Run(first.settings)
    assert not second.stages
    assert second.json["emulator"]["reused_stage_one"]
    for before, after in zip(first.json["tenants"], second.json["tenants"], strict=True):
        assert {row: after[row] for row in (*ROWS, "delta_digest")} == {
            row: before[row] for row in (*ROWS, "delta_digest")
        }
    assert not actors_left()


def test_three_owners_on_two_processors_take_turns_and_secrets_stay_apart(tmp_path: Path) -> None:
    settings = write_tiny_run(tmp_path, evaluator=False)
    bob = settings.tenants[1]
    write_text(tmp_path / "carol.jsonl", WORDS[5:], 30)
    data = bob.train.model_copy(update={"path": str(tmp_path / "carol.jsonl")})
    carol = bob.model_copy(update={"name": "carol", "train": data, "cpus": 2})
    run = Run(settings.model_copy(update={"tenants": (carol, settings.tenants[0], bob)}))
    assert [tenant["name"] for tenant in run.json["tenants"]] == ["carol", "alice", "bob"]
    for tenant in run.json["tenants"]:
        assert [row for row in ROWS if tenant[row] is not None] == ["emulator_zero_shot", "emulator_tuned"]
        assert (tenant["delta"], tenant["gain"]["usable"], tenant["gain"]["value"]) == (None, False, None)
    # Carol has both processors to herself.
    steps = [progress.stage for progress in run.heard if progress.stage.startswith("tune ")]
    carols = [index for index, stage in enumerate(steps) if stage == "tune carol"]
    assert carols == list(range(carols[0], carols[0] + len(carols)))
    recipients = {line["recipient"] for line in AuditLog(run.json["audit"]).read()}
    assert not any(name.startswith("evaluator") for name in recipients)
    assert not (Path(run.settings.output) / "evaluator").exists()


def test_one_owner_leaves_a_processor_to_the_evaluator(tmp_path: Path) -> None:
    settings = write_tiny_run(tmp_path, tune={"steps": 600})
    run = Run(settings.model_copy(update={"tenants": settings.tenants[:1]}))
    stages = [progress.stage for progress in run.heard]
    last_of_tuning = max(index for index, stage in enumerate(stages) if stage == "tune alice")
    # The full model's rows need no delta; plugging in does.
    assert stages.index("full zero shot alice") < last_of_tuning < stages.index("plug in alice")
    assert all(run.json["tenants"][0][row] > 0 for row in ROWS)


def test_an_owners_error_ends_the_run_with_its_name(tmp_path: Path) -> None:
    settings = write_tiny_run(tmp_path, evaluator=False)
    rows = write_text(Path(settings.tenants[1].train.path), WORDS, 2 * LOOKED_AT)
    with rows.open("a") as file:
        file.write('{"other": "column"}\n')  # too far down to be seen before everything starts
    with pytest.raises(DataError, match=rf"data owner bob: .*line {2 * LOOKED_AT + 1}: .*no column 'text'") as caught:
        run_local(settings)
    assert type(caught.value) is DataError
    assert not actors_left()
    read_artifact(Path(settings.output) / "emulator")  # what was finished is whole


def test_an_actor_that_is_still_starting_goes_with_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(phases: Phases) -> None:
        actors = phases.state.actors
        phases._start_coordinator()
        while not marked(ACTORS, actors.mark):
            time.sleep(0.01)
        marks.append(actors.mark)
        assert actors.coordinator.pid is None
        raise RunFailed("Something else failed.", "None.")

    marks = list[str]()
    monkeypatch.setattr(Phases, "run", run)
    with pytest.raises(RunFailed, match="Something else"):
        run_local(write_tiny_run(tmp_path))
    assert not marked(ACTORS, marks[0])


def choices(path: Path, seed: int) -> Path:
    """Questions of two answers, as JSON Lines."""
    draw = random.Random(seed)
    rows = [
        {"prompt": " ".join(draw.choices(WORDS, k=5)), "choices": draw.sample(WORDS, 2), "label": draw.randrange(2)}
        for _ in range(12)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("evaluator", [False, True])
def test_multiple_choice_shows_every_number_that_was_sent(tmp_path: Path, evaluator: bool) -> None:
    settings = write_tiny_run(tmp_path, evaluator=evaluator, tune={"steps": 3, "learning_rate": 1e-2})
    train, test = (
        DataSettings(path=str(choices(tmp_path / f"choice-{seed}.jsonl", seed)), task="choice") for seed in (1, 2)
    )
    # Keys of its own; the others come from the run's section.
    alice = settings.tenants[0].model_copy(update={"train": train, "test": test, "tune": TuneSettings(method="lora")})
    run = Run(settings.model_copy(update={"tenants": (alice,)}))
    (tenant,) = run.json["tenants"]
    folder = Path(settings.output) / "tenants" / "alice"
    delta = read_manifest(folder / "delta").content
    assert delta.method == "lora"
    assert [progress.steps for progress in run.heard if progress.stage == "tune alice"][-1] == 3
    sent = read_manifest(folder / "metrics").content.values
    further = {measure: tenant[measure] for measure in ("normalised", "log_likelihood", "log_probability")}
    for measure, section in further.items():
        assert section["emulator_zero_shot"] == sent[f"emulator_zero_shot.{measure}"]
        assert section["emulator_tuned"] == pytest.approx(sent[f"emulator_tuned.{measure}"], rel=1e-5)
    for section in (tenant, *further.values()):
        if evaluator:
            assert section["delta_interval"][0] <= section["delta"] <= section["delta_interval"][1]
        else:
            assert (section["plug_in"], section["delta"], section["delta_interval"]) == (None, None, None)
    stream = io.StringIO()
    show_standard_table(Console(file=stream, width=200), run.json["tenants"])
    tables = stream.getvalue().split("emulator zero-shot")
    assert len(tables) == 5  # accuracy, length-normalised accuracy, log-likelihood, log-probability
    assert f"{sent['emulator_zero_shot.log_likelihood']:.3f}" in tables[3]


def test_an_emulator_that_hides_nothing_stays_at_home(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model owner: emulator.alpha"):
        run_local(write_tiny_run(tmp_path, emulator={"alpha": 0.0}))
    assert not actors_left()
