"""How long it takes until a killed process of a run has a successor that works: a data owner's, the coordinator's.

The model is random and made here; two data owners tune whole plug-in layers, each on one processor. While both do,
one of them is killed; once its new process has tuned a step, the coordinator is killed; then the run goes on to its
end.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import ray

from benchmarks.overhead.spread import ratios, spread
from benchmarks.tenants.options import add_run, tune_settings, whole_number
from benchmarks.tenants.run_processes import COORDINATOR, DATA_OWNER, CoordinatorWatch, actor_processes
from benchmarks.tenants.subject import Subject
from scaleot_ray.errors import RunFailed
from scaleot_ray.federation.run import run_local
from scaleot_ray.progress import Progress, TenantState

HELP = "seconds until a killed process has a successor that works"

TENANTS = 2
KILLED = ("data_owner", "coordinator")

_ANSWER_SECONDS = 300.0  # as long as a run waits for an actor to start


def add_options(parser: argparse.ArgumentParser) -> None:
    """What may be chosen beside ``--output`` and ``--note``."""
    add_run(parser, steps=100)
    parser.add_argument("--repeats", type=int, default=5, help="runs, each with both kills; default: %(default)s")


def measure(options: argparse.Namespace, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Makes model and emulator in ``folder``, and measures; gives what goes into the JSON."""
    repeats, tune = whole_number(options, "repeats", 1, "a run is measured"), tune_settings(options)
    say("making the model and its emulator")
    subject = Subject(folder, options.hidden, options.layers, tune)
    subject.check_room(TENANTS)
    return {
        **subject.as_json(),
        "recovery": compare_recovery(subject, repeats, say),
    }


def compare_recovery(subject: Subject, repeats: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Kills both kinds of process in each of ``repeats`` runs.

    Args:
        subject: what the runs are of; its tuning must last until both have been killed.
        repeats: runs.
        say: hears of each.

    Returns:
        For ``data_owner`` and ``coordinator`` seconds: ``recovery`` (from SIGKILL to the first step in the new process;
        to the first answer of the new one, which it has from the registry), ``start`` (of the same data owner in the
        same run, from when it was to start to its first step; of the coordinator, from when Ray was there to when its
        process was ready), and the ratio ``recovery / start``, run by run.

    Raises:
        RunFailed: tuning was over too soon.
        ScaleOTError: a run failed, or was interrupted.
    """
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KILLED}
    for repeat in range(repeats):
        for kind, figures in _measure(subject).items():
            found[kind].append(figures)
            say(
                f"recovery, run {repeat + 1} of {repeats}, {kind.replace('_', ' ')}: {figures[0]:.1f} s, "
                f"first start {figures[1]:.1f} s"
            )
    return {kind: _summary([one for one, _ in pairs], [one for _, one in pairs]) for kind, pairs in found.items()}


def _summary(recovery: list[float], start: list[float]) -> dict[str, Any]:
    return {"recovery": spread(recovery), "start": spread(start), "recovery / start": ratios(recovery, start)}


def _measure(subject: Subject) -> dict[str, tuple[float, float]]:
    """One run: by kind of process, the seconds of its recovery and of its first start."""
    begun = time.monotonic()
    with subject.run_of(TENANTS) as settings, CoordinatorWatch() as watch:
        kills = Kills({tenant.name for tenant in settings.tenants})
        report = run_local(settings, on_progress=kills.progress, on_state=kills.state)
    if kills.coordinator_seconds is None or watch.ready is None:
        raise RunFailed("Tuning was over before data owner and coordinator had been killed.", "Give more --steps.")
    first = watch.ready - (begun + report.seconds["start"])
    return {
        "data_owner": (kills.data_owner_seconds, kills.start_seconds),
        "coordinator": (kills.coordinator_seconds, first),
    }


class Kills:
    """Kills a data owner, then the coordinator, from within the callbacks of the run's driver.

    Which of the data owners a process belongs to does not show: one is killed while all of them tune, and the
    driver then says whose it was.

    Args:
        names: the data owners.

    Attributes:
        data_owner_seconds: from the kill of one to the first step in its new process.
        start_seconds: from when it was to start in the first place to its first step.
        coordinator_seconds: from the kill of the coordinator to the first answer of the new one; None before.
    """

    def __init__(self, names: set[str]) -> None:
        self.data_owner_seconds = self.start_seconds = 0.0
        self.coordinator_seconds: float | None = None
        self._names = names
        self._told: dict[str, float] = {}  # when each was to start first
        self._first_step: dict[str, float] = {}
        self._one_is_done = False
        self._killed_at: float | None = None
        self._before: set[int] = set()
        self._whose: str | None = None

    def state(self, told: TenantState) -> None:
        """Hears what a data owner is about."""
        if told.state == "tuning":
            self._told.setdefault(told.tenant, time.monotonic())
        elif told.state == "waiting" and self._killed_at is not None and self._whose is None:
            self._whose = told.tenant

    def progress(self, told: Progress) -> None:
        """Hears of a step, and kills when it is time.

        Raises:
            RunFailed: a data owner was done before all of them tuned.
        """
        if told.tenant is None or told.stage != f"tune {told.tenant}" or self.coordinator_seconds is not None:
            return
        self._first_step.setdefault(told.tenant, time.monotonic())
        self._one_is_done = self._one_is_done or told.step >= told.steps
        if self._killed_at is None:
            if self._first_step.keys() == self._names:
                self._kill_data_owner()
        elif told.tenant == self._whose and self._has_successor():
            self.data_owner_seconds = time.monotonic() - self._killed_at
            self.start_seconds = self._first_step[told.tenant] - self._told[told.tenant]
            self.coordinator_seconds = _kill_coordinator(told.tenant)

    def _kill_data_owner(self) -> None:
        processes = actor_processes(DATA_OWNER)
        if self._one_is_done or len(processes) < len(self._names):
            raise RunFailed("A data owner was done before all of them tuned.", "Give more --steps, on two free cores.")
        self._before, self._killed_at = {process.pid for process in processes}, time.monotonic()
        processes[0].kill()

    def _has_successor(self) -> bool:
        # A report that the killed process had sent may come after the driver knows of its death.
        return any(process.pid not in self._before for process in actor_processes(DATA_OWNER))


def _kill_coordinator(tenant: str) -> float:
    """Seconds from SIGKILL until the new coordinator has said what its registry knows of a data owner."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    (named,) = [one for one in actors if one["name"].startswith("coordinator-")]
    actor = ray.get_actor(named["name"], named["namespace"])
    (process,) = actor_processes(COORDINATOR)
    begun = time.monotonic()
    process.kill()
    psutil.wait_procs([process], timeout=_ANSWER_SECONDS)
    ray.get(actor.entry.remote(tenant), timeout=_ANSWER_SECONDS)
    seconds = time.monotonic() - begun
    if ray.get(actor.present.remote(), timeout=_ANSWER_SECONDS).pid == process.pid:
        raise RunFailed("The coordinator outlived SIGKILL.", "Run the same command again.")
    return seconds


def lines(document: Mapping[str, Any]) -> list[str]:
    """The table that is printed."""
    rows = ["| killed | recovery, s | first start, s | recovery ÷ first start |", "|---|---|---|---|"]
    for kind, found in document["recovery"].items():
        cells = [_cell(found[key], digits) for key, digits in (("recovery", 1), ("start", 1), ("recovery / start", 2))]
        rows.append(f"| {kind.replace('_', ' ')} | {' | '.join(cells)} |")
    return rows


def _cell(found: Mapping[str, Any], digits: int) -> str:
    return f"{found['median']:.{digits}f} ({found['low']:.{digits}f} to {found['high']:.{digits}f})"
