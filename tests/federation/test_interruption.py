"""Ctrl-C and SIGTERM at any stage: processes gone within seconds, checkpoints usable, the rest goes on."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from scaleot_ray.artifacts.audit import AuditLog
from scaleot_ray.artifacts.storage import read_artifact
from scaleot_ray.errors import Interrupted
from scaleot_ray.evaluation.table import ROWS
from scaleot_ray.interruption import interruptible
from scaleot_ray.resources.session import Session
from tests.cli.command import environment
from tests.federation.scenario import run_once

PROJECT = Path(__file__).parents[2]
SETTINGS = {
    "stage_one": {"steps": 150, "checkpoint_every": 5},
    "tune": {"steps": 150, "checkpoint_every": 5},
    "evaluator": False,
}
EVALUATED = {**SETTINGS, "stage_one": {}, "evaluator": True}


class Runs:
    """Runs one after the other, in a process group that gets signals as from a terminal or a scheduler."""

    def __init__(self, folder: Path, *scenarios: dict[str, Any]) -> None:
        announced = [{"announce": True, **scenario} for scenario in scenarios]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.federation.scenario", str(folder), json.dumps(announced)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=PROJECT,
            env=environment(),
            start_new_session=True,
            # A test run in the background ignores Ctrl-C, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self.told: list[str] = []
        self.folders: set[Path] = set()  # of the runs' private Rays
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.told.append(line.strip())

    def family(self) -> list[tuple[psutil.Process, str]]:
        """All processes of the run, but the driver, and their commands."""
        found = [(process, _command(process)) for process in psutil.Process(self.process.pid).children(recursive=True)]
        self.folders |= {Path(part) for _, command in found for part in re.findall(r"/\S*/scaleot-\w+", command)}
        return found

    def interrupt_when(self, happened: Callable[[Runs], bool], number: int, times: int = 1) -> dict[str, Any]:
        """Sends a signal to the whole group once something has happened; what came of the run."""
        deadline = time.monotonic() + 240
        assert self.process.stdout is not None
        while not happened(self):
            assert self.process.poll() is None, [*self.told, self.process.stdout.read()]
            assert time.monotonic() < deadline, self.told
            time.sleep(0.01)
        # At once: what is being waited for may be over in a second.
        os.killpg(self.process.pid, number)
        start = time.monotonic()
        family = [process for process, _ in self.family()]
        assert self.folders
        for _ in range(times - 1):  # people press it twice
            time.sleep(0.5)
            os.killpg(self.process.pid, number)
        line = self.process.stdout.readline()
        assert line, self.told
        seconds = time.monotonic() - start
        _, left = psutil.wait_procs(family, timeout=1)
        assert not [process for process in left if _runs(process)]
        assert not [folder for folder in self.folders if folder.exists()]
        self.told.clear()
        result: dict[str, Any] = json.loads(line)
        assert result["error"] == "Interrupted", result
        assert signal.Signals(number).name in result["problem"]
        assert "Run the same command again" in result["remedy"]
        assert result["left"] == []
        assert seconds < 20
        return result

    def end(self) -> None:
        """Waits for the driver, which has nothing left to do."""
        self.process.communicate(timeout=60)
        assert self.process.returncode == 0


def _runs(process: psutil.Process) -> bool:
    """False for one that has ended and that the machine's first process has not put away yet."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def step(stage: str, number: int) -> Callable[[Runs], bool]:
    """The run has told of this step of a stage."""

    def told(runs: Runs) -> bool:
        lines = [line.rpartition(" ") for line in list(runs.told)]
        return any(name == stage and done.isdigit() and int(done) >= number for name, _, done in lines)

    return told


def ray_has_started(process: str) -> Callable[[Runs], bool]:
    """One of Ray's own processes is there, and no actor yet."""
    return lambda runs: any(process in command for _, command in runs.family())


def publishing(audit: Path) -> Callable[[Runs], bool]:
    """The coordinator has opened the audit log, to record that the emulator goes out."""

    def opened(runs: Runs) -> bool:
        for process, command in runs.family():
            try:
                if "Coordinator" in command and any(file.path == str(audit) for file in process.open_files()):
                    return True
            except psutil.Error:
                continue
        return False

    return opened


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keeps others from writing to a file that is written under a lock."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.mark.timeout(900)
def test_interrupted_twice_a_run_ends_as_if_it_had_not_been(connected_ray: Session, tmp_path: Path) -> None:
    folder = tmp_path / "interrupted"
    runs = Runs(folder, *[{"settings": SETTINGS}] * 2)
    for happened, number in ((step("stage 1", 20), signal.SIGTERM), (step("tune bob", 20), signal.SIGINT)):
        second = runs.interrupt_when(happened, number, times=2)
    runs.end()
    # Each goes on where the one before was stopped.
    assert second["first_seen"]["stage 1"] > 15
    third = run_once(folder, {"settings": SETTINGS})
    assert "stage 1" not in third["first_seen"]
    assert third["first_seen"]["tune bob"] > 15
    whole = run_once(tmp_path / "whole", {"settings": SETTINGS})
    assert third["report"]["emulator"]["digest"] == whole["report"]["emulator"]["digest"]
    digests = [[tenant["delta_digest"] for tenant in run["report"]["tenants"]] for run in (third, whole)]
    assert digests[0] == digests[1]


@pytest.mark.timeout(900)
def test_interrupted_while_ray_starts_the_emulator_goes_out_or_rows_are_measured(
    connected_ray: Session, tmp_path: Path
) -> None:
    scenario = {"settings": EVALUATED, "tenants": 1}
    audit = tmp_path / "run" / "audit.jsonl"
    runs = Runs(tmp_path, *[scenario] * 4)
    # SIGTERM to the whole group ends Ray's first process too, and in its first moments Ray itself, deaf to
    # signals, waits half a minute for it: the run then ends in order, but not within seconds.
    for process, number in (("gcs_server", signal.SIGINT), ("raylet/raylet", signal.SIGTERM)):
        assert runs.interrupt_when(ray_has_started(process), number)["first_seen"] == {}
    with locked(audit):
        built = runs.interrupt_when(publishing(audit), signal.SIGTERM)
    assert "stage 1" in built["first_seen"]
    assert AuditLog(audit).read() == []  # it was about to go out, and nothing has
    digest = read_artifact(tmp_path / "run" / "emulator").digest
    measuring = runs.interrupt_when(step("tune full alice", 20), signal.SIGINT)
    assert "stage 1" not in measuring["first_seen"]
    runs.end()
    rest = run_once(tmp_path, scenario)
    assert rest["first_seen"]["tune full alice"] > 15
    assert "full zero shot alice" not in rest["first_seen"]  # it had been measured
    assert rest["report"]["emulator"]["digest"] == digest
    assert all(rest["report"]["tenants"][0][row] > 0 for row in ROWS)


@pytest.fixture
def heeds_ctrl_c() -> Iterator[None]:
    """As in a terminal, wherever the tests run."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_ctrl_c")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("raised", [KeyboardInterrupt, SystemExit])
def test_the_signal_that_came_is_named_whoever_raises(number: signal.Signals, raised: type[BaseException]) -> None:
    """Ray, waiting, raises an exception of its own in place of the handler's."""

    def wait_like_ray() -> None:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
        signal.raise_signal(signal.SIGINT)  # impatience changes nothing
        signal.raise_signal(signal.SIGTERM)
        raise raised

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match=rf"interrupted \({number.name}\)"), interruptible("Again."):
        wait_like_ray()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize(("raised", "name"), [(KeyboardInterrupt, "SIGINT"), (SystemExit, "SIGTERM")])
def test_where_ray_has_its_own_handlers_in_place_the_exception_says_which(
    raised: type[BaseException], name: str
) -> None:
    with pytest.raises(Interrupted, match=rf"interrupted \({name}\)"), interruptible("Again."):
        raise raised


def test_a_sigint_that_is_to_be_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruptible("Again."):
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
