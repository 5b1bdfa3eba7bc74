"""The scripts in ``jobs/`` under a real ``ray job submit``: results, exit codes, stopping, and what is refused."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from scaleot_ray.artifacts.storage import read_artifact
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
