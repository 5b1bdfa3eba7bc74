"""The doctor finds what is wrong with a machine, and each finding has its remedy."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import transformers

from scaleot_ray.cli import checks
from scaleot_ray.cli.checks import GIB
from scaleot_ray.resources import machine
from tests.cli.command import Warm, scaleot
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


# ---- --model: what a build and a tuning would need


def wide_model(folder: Path) -> Path:
    """The config of a model with the widths of a 7B one, and no weights: a plan reads none."""
    transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=6, num_attention_heads=32, dtype="bfloat16"
    ).save_pretrained(folder)
    return folder


PLAN = ("--set", "emulator.plug_in_layers=2", "--memory", 100, "--format", "json")


def test_a_plan_from_the_config_alone(tmp_path: Path, warm: Warm) -> None:
    wide_model(tmp_path / "model")
    done = warm.scaleot("doctor", "--model", "model", "--dtype", "bfloat16", "--stream", *PLAN, cwd=tmp_path)
    assert done.code == 0, done.err
    document = done.json
    assert document["schema"] == "scaleot.plan/1"
    assert JsonPage().undocumented(document) == set()
    assert document["fits"]
    assert document["shortages"] == {}
    assert document["room"]["memory"] == 100e9
    for process in (*document["build"]["processes"], document["tune"]):
        assert process["memory"] == max(phase["memory"] for phase in process["phases"]) > 0
        assert all(size >= 0 for phase in process["phases"] for size in phase["parts"].values())
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["config.json"]


def test_what_does_not_fit_is_exit_code_4_with_options_that_do(tmp_path: Path, warm: Warm) -> None:
    wide_model(tmp_path / "model")
    small = ("--memory", 7, "--format", "json")
    done = warm.scaleot("doctor", "--model", "model", *PLAN[:2], *small, cwd=tmp_path)
    assert done.code == 4, done.err
    document = done.json
    assert JsonPage().undocumented(document) == JsonPage().gone(document) == set()
    assert not document["fits"]
    assert document["shortages"]["memory"]["needed"] > document["shortages"]["memory"]["there"] == 7e9
    assert document["cheapest"]["build"]["memory"] < 7e9
    # What is said to fit does, given to the same command.
    options = document["cheapest"]["options"].split()
    again = warm.scaleot("doctor", "--model", "model", *PLAN[:2], *small, *options, cwd=tmp_path)
    assert again.code == 0, again.out
    assert again.json["build"]["memory"] == document["cheapest"]["build"]["memory"]


def test_a_build_that_cannot_fit_is_refused_before_it_loads_anything(tmp_path: Path) -> None:
    # 410 GB in float32: more than a machine of these tests has. Its weights are not even there.
    transformers.LlamaConfig(
        hidden_size=16384, intermediate_size=65536, num_hidden_layers=24, num_attention_heads=64
    ).save_pretrained(tmp_path / "model")
    public = tmp_path / "public.txt"
    public.write_text("some text\n" * 100)
    done = scaleot(
        *("build", "--model", tmp_path / "model", "--public", public, "--output", tmp_path / "emulator"),
        *("--plug-in-layers", 2, "--format", "json"),
    )
    assert done.error["type"] == "ResourcesMissing", done.error
    assert "This build needs about" in done.error["message"]
    assert "GB of memory" in done.error["message"]
    assert "scaleot doctor --model" in done.error["remedy"]
    assert not (tmp_path / "emulator").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--stream",), "--stream: says how a model is built, but there is no --model"),
        (("--zero", "2"), "--workers, --gpus or --zero: says how a model is built"),
        (("--model", "nowhere"), "nowhere"),
        (("--model", "model", "--memory", "-1"), "--memory: -1.0 is no size"),
        (("--model", "model", "--set", "emulator.alfa=1"), "emulator.alfa"),
    ],
)
def test_a_plan_that_makes_no_sense(options: tuple[str, ...], message: str, tmp_path: Path, warm: Warm) -> None:
    wide_model(tmp_path / "model")
    done = warm.scaleot("doctor", *options, "--format", "json", cwd=tmp_path)
    assert done.error["code"] == 2, done.error
    assert message in done.error["message"]
    assert done.error["remedy"]
