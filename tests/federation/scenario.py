"""A run in a process of its own, on a Ray of its own, to which something happens.

    python -m tests.federation.scenario FOLDER '[{"kill": "DataOwner", "stage": "tune alice"}]'

Prints one JSON object per run: the error's class, problem and remedy (or the report), the seconds from
the blow to the end, and which processes of the run were left.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from scaleot_ray.errors import ScaleOTError
from scaleot_ray.federation.run import run_local
from scaleot_ray.progress import Progress, TenantState
from tests.tiny_run import write_tiny_run


def actor_processes(kind: str) -> list[psutil.Process]:
    """Processes of living actors of a class, among our descendants."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith(f"ray::{kind}"):
                found.append(process)
        except psutil.Error:
            continue
    return found


def kill(kind: str) -> bool:
    """Ends the first actor of a class, or us; whether there was one."""
    found = [os.getpid()] if kind == "driver" else [process.pid for process in actor_processes(kind)[:1]]
    for pid in found:
        os.kill(pid, signal.SIGKILL)
    return bool(found)


def kill_the_first(kind: str) -> None:
    """Ends an actor of a class as soon as there is one."""
    until = time.monotonic() + 60
    while not kill(kind) and time.monotonic() < until:
        time.sleep(0.01)


def run_once(folder: Path, scenario: dict[str, Any]) -> dict[str, Any]:
    """One run.

    Args:
        scenario: changes to the ``settings``, how many ``tenants``, whether to ``announce`` every step, and
            ``kill``, a class of actors or ``driver``, at a ``stage`` and ``step``; or, in ``kill_at``, classes by the
            state of a data owner (``alice tuning``) at which the first of them goes that is there, or comes.
    """
    settings = write_tiny_run(folder, **scenario.get("settings", {}))
    settings = settings.model_copy(update={"tenants": settings.tenants[: scenario.get("tenants")]})
    blow = 0.0
    seen: dict[str, int] = {}
    least: dict[str, int] = {}
    states: list[str] = []
    kinds: dict[str, str] = dict(scenario.get("kill_at", {}))

    def on_progress(progress: Progress) -> None:
        nonlocal blow
        seen.setdefault(progress.stage, progress.step)
        if scenario.get("announce"):
            print(f"{progress.stage} {progress.step}", file=sys.stderr, flush=True)
        if blow:
            least[progress.stage] = min(progress.step, least.get(progress.stage, progress.step))
        there = progress.stage == scenario.get("stage") and progress.step >= scenario.get("step", 1)
        if "kill" in scenario and there and not blow:
            blow = time.monotonic()
            kill(scenario["kill"])

    def on_state(told: TenantState) -> None:
        states.append(f"{told.tenant} {told.state}: {told.reason}")
        kind = kinds.pop(f"{told.tenant} {told.state}", None)
        if kind is not None:
            threading.Thread(target=kill_the_first, args=(kind,), daemon=True).start()

    result: dict[str, Any]
    try:
        result = {"report": run_local(settings, on_progress=on_progress, on_state=on_state).as_json()}
    except ScaleOTError as error:
        result = {"error": type(error).__name__, "problem": error.problem, "remedy": error.remedy}
    # Those that were killed just now are still on the list until the kernel has taken them apart.
    _, left = psutil.wait_procs(psutil.Process().children(recursive=True), timeout=2)
    seconds = time.monotonic() - blow if blow else None
    return {
        **result,
        "seconds_after_blow": seconds,
        "left": [str(process) for process in left],
        "first_seen": seen,
        "least_seen_after_blow": least,
        "states": states,
    }


if __name__ == "__main__":
    for one in json.loads(sys.argv[2]):
        print(json.dumps(run_once(Path(sys.argv[1]), one)), flush=True)
