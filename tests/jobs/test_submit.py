"""The scripts in ``jobs/`` under a real ``ray job submit``: results, exit codes, stopping, and what is refused."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from scaleot_ray.artifacts.audit import AuditLog
from scaleot_ray.artifacts.storage import read_artifact
from scaleot_ray.emulator.stage_one import steps_done
from scaleot_ray.errors import ConfigError
from scaleot_ray.federation.folder import RunFolder
from scaleot_ray.federation.rounds.status import run_status
from tests.jobs.cluster import Cluster, running_cluster
from tests.tiny_run import write_tiny_run

pytestmark = pytest.mark.slow

BLOCK = {"block_size": 32}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """One cluster for all tests here."""
    with running_cluster() as running:
        yield running
    assert not running.processes("")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk that the nodes share: a tiny model, data, and a YAML file for each job."""
    folder = tmp_path_factory.mktemp("shared")
    run = write_tiny_run(folder).model_dump(mode="json", exclude_unset=True)
    model, emulator = run["model"], str(folder / "emulator")
    documents: dict[str, Any] = {
        "federate": run,
        "build_emulator": {
            **{key: run[key] for key in ("model", "public", "stage_one", "emulator")},
            "output": emulator,
        },
        "tune": {
            "emulator": emulator,
            "train": {"path": str(folder / "alice-train.jsonl")},
            "tune": {"steps": 4, **BLOCK},
            "output": str(folder / "tuned"),
        },
        "evaluate": {
            "model": model,
            "emulator": emulator,
            "delta": str(folder / "tuned" / "delta"),
            "test": {"path": str(folder / "alice-test.jsonl")},
            "folder": str(folder / "rows"),
            **BLOCK,
        },
        "plug_in": {
            "model": model,
            "emulator": emulator,
            "delta": str(folder / "tuned" / "delta"),
            "output": str(folder / "plugged"),
        },
    }
    for name, document in documents.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(document))
    return folder


def submit(cluster: Cluster, shared: Path, name: str, *more: object) -> str:
    """Submits one of the jobs, which must succeed; returns what was printed."""
    done = cluster.submit("python", f"{name}.py", shared / f"{name}.yaml", *more)
    assert done.code == 0, done.out
    return done.out


@pytest.fixture(scope="module")
def emulator(cluster: Cluster, shared: Path) -> Path:
    """Built by a job."""
    submit(cluster, shared, "build_emulator")
    assert read_artifact(shared / "emulator", expected_kind="emulator")
    assert (shared / "emulator-cache").is_dir()
    return shared / "emulator"


def test_tune_plug_in_evaluate(cluster: Cluster, shared: Path, emulator: Path) -> None:
    submit(cluster, shared, "tune")
    delta = read_artifact(shared / "tuned" / "delta", expected_kind="delta")
    assert delta.manifest.parent_digest == read_artifact(emulator).digest
    submit(cluster, shared, "plug_in")
    assert (shared / "plugged" / "config.json").exists()
    # As the script's help says: the redirection alone keeps progress out of the object.
    script = f"python evaluate.py {shared}/evaluate.yaml --format json > {shared}/table.json"
    done = cluster.submit("bash", "-c", script)
    assert done.code == 0, done.out
    table = json.loads((shared / "table.json").read_text())
    assert table["schema"] == "scaleot.eval/1"
    assert table["plug_in"] < table["full_zero_shot"]
    assert "plug in test: " in done.out


def test_a_whole_run_on_the_jobs_node(cluster: Cluster, shared: Path) -> None:
    # Four processors: one for the owner or the evaluator of each tenant; the job itself takes none.
    done = cluster.submit("python", "federate.py", shared / "federate.yaml", cpus=0)
    assert done.code == 0, done.out
    report = json.loads((shared / "run" / "report.json").read_text())
    assert [tenant["name"] for tenant in report["tenants"]] == ["alice", "bob"]
    assert all(tenant["plug_in"] is not None for tenant in report["tenants"])
    assert (shared / "run" / "audit.jsonl").exists()
    assert not cluster.processes("ray::(ModelOwner|DataOwner|Evaluator|Coordinator)")


def test_results_do_not_go_into_the_copy_of_the_working_dir(cluster: Cluster, shared: Path) -> None:
    done = cluster.submit("python", "tune.py", shared / "tune.yaml", "--set", "output=tuned")
    assert (done.code, done.driver_code) == (1, 2)
    assert "output: tuned lies in Ray's copy of the job's --working-dir" in done.out
    assert "Give an absolute path" in done.out
    assert not list(cluster.folder.rglob("tuned"))


def test_the_jobs_exit_code_is_reported(cluster: Cluster, shared: Path, emulator: Path, tmp_path: Path) -> None:
    done = cluster.submit("python", "tune.py", shared / "tune.yaml", "--set", "tune.stepps=1")
    assert (done.code, done.driver_code) == (1, 2)
    assert "unknown key 'tune.stepps'" in done.out
    # A plugged checkpoint is no emulator: refused.
    (tmp_path / "manifest.json").write_text("{}")
    done = cluster.submit("python", "tune.py", shared / "tune.yaml", "--set", f"emulator={tmp_path}")
    assert (done.code, done.driver_code) == (1, 3)


def test_a_stopped_job_goes_on_when_submitted_again(cluster: Cluster, shared: Path, emulator: Path) -> None:
    output = shared / "late"
    settings = [f"output={output}", "tune.steps=1000", "tune.checkpoint_every=5"]
    more = [argument for setting in settings for argument in ("--set", setting)]
    job = ("job", "submit", "--working-dir", "jobs", "--submission-id", "stopped", "--no-wait")
    cluster.ray(*job, "--", "python", "tune.py", shared / "tune.yaml", *more)
    deadline = time.monotonic() + 120
    while not list(output.glob("checkpoint/*.safetensors")):
        assert time.monotonic() < deadline, cluster.ray("job", "logs", "stopped").stdout
        time.sleep(0.2)
    assert cluster.ray("job", "stop", "stopped").returncode == 0
    assert "was stopped" in cluster.ray("job", "status", "stopped").stdout
    assert not cluster.processes(r"tune\.py")
    assert "was interrupted" in cluster.ray("job", "logs", "stopped").stdout
    assert not (output / "delta").exists()
    again = submit(cluster, shared, "tune", *more)
    first = next(line for line in again.splitlines() if line.startswith("tune data owner: "))
    assert int(first.split()[3].split("/")[0]) > 5, again
    assert read_artifact(output / "delta", expected_kind="delta")


def test_a_build_by_workers_goes_on_when_submitted_again(cluster: Cluster, shared: Path) -> None:
    output = shared / "by-workers"
    settings = [f"output={output}", "parallel.workers=2", "stage_one.steps=300", "stage_one.checkpoint_every=5"]
    more = [argument for setting in settings for argument in ("--set", setting)]
    job = ("job", "submit", "--working-dir", "jobs", "--submission-id", "workers", "--entrypoint-num-cpus", "1")
    cluster.ray(*job, "--no-wait", "--", "python", "build_emulator.py", shared / "build_emulator.yaml", *more)
    deadline = time.monotonic() + 240
    while not any(steps_done(file) for file in shared.glob("by-workers-cache/*/stage_one.safetensors")):
        assert time.monotonic() < deadline, cluster.ray("job", "logs", "workers").stdout
        time.sleep(0.2)
    assert len(cluster.processes("^ray::Worker")) == 2
    assert cluster.ray("job", "stop", "workers").returncode == 0
    assert "was interrupted" in cluster.ray("job", "logs", "workers").stdout
    assert not cluster.processes("^ray::Worker")
    assert not output.exists()
    again = submit(cluster, shared, "build_emulator", *more)
    steps = [int(found.group(1)) for found in re.finditer(r"^stage 1: (\d+)/300", again, flags=re.M)]
    assert steps[0] > 5, again
    assert "calibrate" not in again
    assert read_artifact(output, expected_kind="emulator")
    assert not cluster.processes("^ray::Worker")


FOUR = ("alice", "bob", "carol", "dave")


@pytest.fixture
def rounds(shared: Path) -> Path:
    """The YAML of a run of two rounds with four data owners, who tune one after the other."""
    changes: dict[str, Any] = {
        "rounds": {"count": 2},
        "aggregation": {"method": "mean"},
        "tune": {"steps": 4},
        "tenants": [
            {
                "name": name,
                "train": {"path": str(shared / f"{data}-train.jsonl")},
                "test": {"path": str(shared / f"{data}-test.jsonl")},
            }
            for name, data in zip(FOUR, ("alice", "bob") * 2, strict=True)
        ],
        "tenants_at_once": 1,
        "evaluator": False,
        "output": str(shared / "rounds"),
    }
    settings = write_tiny_run(shared, **changes).model_dump(mode="json", exclude_unset=True)
    path = shared / "rounds.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def crossed(run: Path) -> Counter[str]:
    """How many deltas each data owner has sent, by the audit log: one for every tuning that came to its end."""
    lines = AuditLog(RunFolder(run).audit).read()
    return Counter(line["sender"] for line in lines if (line["kind"], line["recipient"]) == ("delta", "model owner"))


def submitted(run: Path) -> list[list[str]]:
    """By round, the data owners whose delta the registry has."""
    try:
        rounds = run_status(RunFolder(run))["rounds"]
    except ConfigError:
        return []  # there is no registry yet
    return [[part["name"] for part in one["tenants"] if part["state"] == "submitted"] for one in rounds]


def test_a_job_with_rounds_goes_on_and_is_reused(cluster: Cluster, shared: Path, rounds: Path) -> None:
    stranger = replace(cluster, env={**cluster.env, "RAY_AUTH_TOKEN": "0" * 64})
    refused = stranger.submit("python", "federate.py", rounds, cpus=0)
    assert refused.code != 0
    assert "authentication token" in refused.out

    run = shared / "rounds"
    job = ("job", "submit", "--working-dir", "jobs", "--submission-id", "rounds", "--no-wait")
    cluster.ray(*job, "--", "python", "federate.py", rounds)
    deadline = time.monotonic() + 240
    while not any(submitted(run)):
        assert time.monotonic() < deadline, cluster.ray("job", "logs", "rounds").stdout
        time.sleep(0.1)
    assert cluster.ray("job", "stop", "rounds").returncode == 0
    first = submitted(run)
    assert 0 < sum(map(len, first)) < 2 * len(FOUR), "stopped too late to show anything"
    assert not (run / "report.json").exists()

    done = cluster.submit("python", "federate.py", rounds, cpus=0)
    assert done.code == 0, done.out
    assert submitted(run) == [[*FOUR]] * 2
    sent = crossed(run)
    # One for each round: what had been submitted before the stop was not tuned again.
    assert {name: sent[f"data owner {name}"] for name in first[0]} == dict.fromkeys(first[0], 2)
    report = json.loads((run / "report.json").read_text())
    assert report["aggregate"]["round"] == 2

    again = cluster.submit("python", "federate.py", rounds, cpus=0)
    assert again.code == 0, again.out
    assert "tune alice" in done.out
    assert not re.search("tune |stage 1|fit in order", again.out), again.out
    assert crossed(run) == sent
    assert json.loads((run / "report.json").read_text())["aggregate"] == report["aggregate"]
