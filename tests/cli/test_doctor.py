"""The doctor finds what is wrong with a machine, and each finding has its remedy."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from scaleot_ray.cli import checks
from scaleot_ray.cli.checks import GIB
from scaleot_ray.resources import machine
from tests.cli.command import scaleot
from tests.cli.documented_keys import JsonPage


def test_this_machine() -> None:
    done = scaleot("doctor", "--format", "json")
    document = done.json
    assert document["schema"] == "scaleot.doctor/1"
    assert JsonPage().undocumented(document) == JsonPage().gone(document) == set()
    found = {check["name"]: check for check in document["checks"]}
    assert set(found) == {
        *(
            "python",
            "packages",
            "threads",
            "memory",
            "disk",
            "shared memory",
            "gpu",
            "ray",
            "object store",
        ),
    }
    assert found["ray"]["status"] == "ok", found["ray"]
    assert found["object store"]["status"] == "ok"
    assert found["python"]["status"] == found["packages"]["status"] == "ok"
    failed = any(check["status"] == "fail" for check in document["checks"])
    assert document["ok"] is not failed
    assert done.code == (4 if failed else 0)
    assert all(check["remedy"] for check in document["checks"] if check["status"] != "ok")


def test_a_failed_check_is_exit_code_4(tmp_path: Path) -> None:
    # A Ray that cannot start: the program that starts it dies at once.
    (tmp_path / "ray.py").write_text("raise SystemExit('no ray today')\n")
    done = scaleot("doctor", PYTHONPATH=str(tmp_path))
    assert done.code == 4
    assert "fail  ray" in done.out
    assert "no ray today" in done.out
    assert "ray stop" in done.out


def test_python_version() -> None:
    assert checks.python_version((3, 10, 0)).status == "ok"
    assert checks.python_version((3, 9, 18)).status == "fail"


@pytest.mark.parametrize(
    ("omp", "status"), [(None, "ok"), ("4", "ok"), ("64", "warn"), ("1", "warn"), ("many", "warn"), ("0", "warn")]
)
def test_threads(omp: str | None, status: str) -> None:
    check = checks.threads(4, omp)
    assert check.status == status
    assert bool(check.remedy) == (status != "ok")


@pytest.mark.parametrize(("gib", "status"), [(1, "fail"), (6, "warn"), (32, "ok")])
def test_memory(gib: int, status: str) -> None:
    assert checks.memory(gib * GIB).status == status


@pytest.mark.parametrize(("free", "status"), [(0.2, "fail"), (3, "warn"), (50, "ok")])
def test_disk(free: float, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: SimpleNamespace(free=int(free * GIB)))
    assert checks.disk(tmp_path).status == status


def test_shared_memory() -> None:
    assert checks.shared_memory(64 * 2**20).status == "warn"
    assert "--shm-size" in checks.shared_memory(64 * 2**20).remedy
    assert checks.shared_memory(8 * GIB).status == "ok"
    assert checks.shared_memory(None).status == "ok"


@pytest.mark.parametrize(("version", "problem"), [("0.1", "torch is 0.1, needed"), (None, "torch>=2.6 is missing")])
def test_packages(version: str | None, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = checks.metadata.version

    def pretend(name: str) -> str:
        if name == "torch":
            if version is None:
                raise checks.metadata.PackageNotFoundError(name)
            return version
        return real(name)

    assert checks.packages().status == "ok"
    monkeypatch.setattr(checks.metadata, "version", pretend)
    assert checks.packages().status == "fail"
    assert problem in checks.packages().found
    assert "pip install --upgrade ." in checks.packages().remedy
    assert [check.name for check in checks.all_checks()] == ["python", "packages"]


def ray_probe(monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[checks.Check]:
    def run(*_: Any, **__: Any) -> Any:
        if isinstance(answer, BaseException):
            raise answer
        return answer

    monkeypatch.setattr(checks.subprocess, "run", run)
    return list(checks.ray_checks())


def test_a_ray_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    (check,) = ray_probe(monkeypatch, subprocess.TimeoutExpired("probe", 120))
    assert check.status == "fail"
    assert "120 s" in check.found


def test_the_probe_uses_a_folder_of_its_own_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where a run keeps Ray's session files, the doctor does: whether Ray starts may depend on the folder."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(machine, "_SOCKET_PATH_LIMIT", 1000)
    used = []

    def run(command: list[str], **options: Any) -> Any:
        used.append(Path(command[-1]))
        assert used[-1].is_dir()
        (used[-1] / "session_latest").mkdir()
        return SimpleNamespace(returncode=0, stdout='{"seconds": 3.0, "zero_copy": true}\n', stderr="")

    monkeypatch.setattr(checks.subprocess, "run", run)
    assert [check.status for check in checks.ray_checks()] == ["ok", "ok"]
    assert used[0].parent == tmp_path
    assert list(tmp_path.iterdir()) == []


def test_a_probe_that_had_to_be_killed_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A Ray that hangs has started processes already; they outlive the probe."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(machine, "_SOCKET_PATH_LIMIT", 1000)
    real, children = subprocess.run, []
    script = "import subprocess, sys, time; print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"

    def run(command: list[str], **options: Any) -> Any:
        try:
            return real([command[0], "-c", script], **{**options, "timeout": 3})
        except subprocess.TimeoutExpired as error:
            children.append(int(error.stdout))
            assert psutil.pid_exists(children[0])
            raise

    monkeypatch.setattr(checks.subprocess, "run", run)
    (check,) = checks.ray_checks()
    assert check.status == "fail"
    assert not psutil.pid_exists(children[0]) or psutil.Process(children[0]).status() == psutil.STATUS_ZOMBIE
    assert list(tmp_path.iterdir()) == []


def test_a_temporary_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    monkeypatch.setattr(machine, "_SOCKET_PATH_LIMIT", 1000)
    (check,) = checks.ray_checks()
    assert check.status == "fail"
    assert "temporary folder" in check.remedy


def test_a_store_that_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = SimpleNamespace(returncode=0, stdout='{"seconds": 3.0, "zero_copy": false}\n', stderr="")
    started, store = ray_probe(monkeypatch, answer)
    assert (started.status, store.status) == ("ok", "warn")
    assert "once per data owner" in store.remedy
