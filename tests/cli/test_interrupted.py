"""Ctrl-C, or SIGTERM from a scheduler: exit code 130, no process left, and the same command goes on."""

from __future__ import annotations

import fcntl
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.cli.command import Finished, Warm, python, started
from tests.cli.conftest import STAGE_ONE

# People press Ctrl-C again while a command removes what is half-written.
AGAIN_IN_CLEAN_UP = """
import shutil, signal, sys, typer
from scaleot_ray.artifacts.atomic import atomic_directory
from scaleot_ray.cli.main import execute
from scaleot_ray.cli.output import working

signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal
app = typer.Typer()
remove = shutil.rmtree

def slowly(*arguments, **options):
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGTERM)
    remove(*arguments, **options)

@app.command()
def write(context: typer.Context):
    with working(context, "Again."), atomic_directory("result", 1, "manifest.json") as partial:
        (partial / "half").write_text("x")
        shutil.rmtree = slowly
        signal.raise_signal(getattr(signal, sys.argv[1]))

sys.exit(execute(app, [], "write"))
"""

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


def stopped(arguments: list[object], ready: Ready, number: signal.Signals, place: Path) -> None:
    with started(*arguments, cwd=place) as process:
        shown = ready(process)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        out, rest = process.communicate(timeout=60)
    assert process.returncode == 130, "".join([*shown, rest])
    assert psutil.wait_procs(children, timeout=5)[1] == []
    assert out == ""
    assert "Traceback" not in rest
    assert f"error: {arguments[0]} was interrupted ({number.name})." in rest
    assert "  → Run the same command again" in rest


def goes_on(arguments: list[object], stage: str, place: Path, warm: Warm) -> Finished:
    done = warm.scaleot(*arguments, cwd=place)
    assert done.code == 0, done.err
    first = re.search(rf"^{stage}: (\d+)/", done.err, flags=re.M)
    assert first is not None
    assert int(first.group(1)) > 2, done.err
    return done


@pytest.mark.parametrize("first", ["SIGINT", "SIGTERM"])
def test_impatience_leaves_nothing_half_written(first: str, tmp_path: Path) -> None:
    done = python("-c", AGAIN_IN_CLEAN_UP, first, cwd=tmp_path)
    assert done.code == 130
    assert f"error: write was interrupted ({first})." in done.err
    assert list(tmp_path.iterdir()) == []


def test_build(place: Path, warm: Warm) -> None:
    settings = [f"--set=stage_one.{item}" for item in (*STAGE_ONE[1:], "steps=400", "checkpoint_every=1")]
    arguments: list[object] = ["build", "--model=model", "--public=public.jsonl", "--output=late", *settings]
    stopped([*arguments, "--plug-in-layers=2"], told("stage 1"), signal.SIGINT, place)
    assert not (place / "late").exists()
    goes_on([*arguments, "--plug-in-layers=2"], "stage 1", place, warm)


def test_tune(place: Path, warm: Warm) -> None:
    settings = ["--set=tune.block_size=32", "--set=tune.steps=400", "--set=tune.checkpoint_every=1"]
    arguments: list[object] = [
        "tune",
        "--emulator=emulator",
        "--train=train.jsonl",
        "--output=late-tuned",
        *settings,
    ]
    stopped(arguments, told("tune data owner"), signal.SIGTERM, place)
    assert not (place / "late-tuned" / "delta").exists()
    goes_on(arguments, "tune data owner", place, warm)


def test_eval(place: Path, warm: Warm) -> None:
    settings = ["block_size=32", "tune.block_size=32", "tune.steps=400", "tune.checkpoint_every=1"]
    arguments: list[object] = ["eval", "--model=model", "--emulator=emulator", "--test=test.jsonl"]
    arguments += [
        "--train=train.jsonl",
        "--rows=full_zero_shot,full_tuned",
        *(f"--set={item}" for item in settings),
    ]
    stopped(arguments, told("tune full test"), signal.SIGINT, place)
    kept = [path.name for path in (place / "scaleot-runs" / "eval").iterdir()]
    assert [name for name in kept if name.startswith("full_tuned-") and name.endswith(".safetensors")]
    again = goes_on(arguments, "tune full test", place, warm)
    assert "full zero shot test" not in again.err  # it had been measured


def test_plug(place: Path, warm: Warm) -> None:
    arguments: list[object] = ["plug", "--model=model", "--emulator=emulator", "--delta=tuned/delta"]
    arguments += ["--output=late-merged/model"]
    audit = place / "late-merged" / "audit.jsonl"
    audit.parent.mkdir()
    with audit.open("a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)  # so that it gets so far and no further
        stopped(arguments, opened(audit), signal.SIGTERM, place)
    assert [path.name for path in audit.parent.iterdir()] == [audit.name]
    assert audit.read_bytes() == b""
    done = warm.scaleot(*arguments, cwd=place)
    assert done.code == 0, done.err
    assert (place / "late-merged" / "model" / "config.json").exists()
