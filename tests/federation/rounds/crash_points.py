"""Kills a keeper of rounds before each of its steps in turn, and looks at what the next one makes of it.

    python -m tests.federation.rounds.crash_points FOLDER_OF_TINY_DELTAS WORK submit

A step is what changes a disk: a statement of SQLite other than one that reads (its COMMIT is one), a file that is
opened to be written, renamed or removed, a folder that is made or removed; and each acknowledgement. Before the k-th
one the process gets SIGKILL; so what the kernel has taken is on the disk, which is what a crash of the process leaves,
not one of the machine. Prints one JSON object for each k: before which step, what had been acknowledged, and what the
next keeper found and made.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from scaleot_ray.artifacts.storage import read_artifact
from scaleot_ray.config import AggregationSettings, RoundSettings
from scaleot_ray.errors import ArtifactRefused
from scaleot_ray.federation.rounds.registry import AGGREGATE
from tests.federation.rounds.keeper_bench import Bench
from tests.federation.rounds.tiny_deltas import TinyDeltas

NAMES = ["ann", "ben"]
SETTINGS: dict[str, Any] = {
    "rounds": RoundSettings(count=2),
    "aggregation": AggregationSettings(server="momentum"),
}
_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate"}
_READS = ("SELECT", "PRAGMA", "EXPLAIN", "--")

Acknowledge = Callable[[str], None]


def kill_before(step: int) -> Acknowledge:
    """Has this process end before the step of that number, counted from now on; gives what counts as one more."""
    count = 0

    def passed(what: str) -> None:
        nonlocal count
        count += 1
        if count == step:
            os.write(2, what.encode())
            os.kill(os.getpid(), signal.SIGKILL)

    def statement(sql: str) -> None:
        if not sql.lstrip().upper().startswith(_READS):
            passed(" ".join(sql.split())[:60])

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _CHANGES:
            passed(f"{event} {Path(str(arguments[0])).name}")
        elif event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            passed(f"open {Path(str(arguments[0])).name}")

    def connect(*arguments: Any, **options: Any) -> sqlite3.Connection:
        connection = really_connect(*arguments, **options)
        connection.set_trace_callback(statement)
        return connection

    really_connect = sqlite3.connect
    sqlite3.connect = connect  # type: ignore[assignment]
    sys.addaudithook(hook)
    return passed


def bench_on(tiny: TinyDeltas, folder: Path) -> Bench:
    """A keeper on a folder, new or one that another has left."""
    return Bench(tiny, folder, **SETTINGS)


def submit(bench: Bench, acknowledge: Acknowledge) -> None:
    """A round from its beginning to its aggregate."""
    number = bench.begin(NAMES)
    for value, name in enumerate(NAMES, start=1):
        bench.send(name, number, float(value))
        acknowledge(name)
    bench.keeper.end(number)
    acknowledge("end")


def submit_again(bench: Bench) -> None:
    """What data owners and driver do who have got no answer."""
    if (number := bench.begin(NAMES)) != 1:
        return
    for value, name in enumerate(NAMES, start=1):
        bench.send(name, number, float(value))
    bench.keeper.end(number)


def revoke(bench: Bench, acknowledge: Acknowledge) -> None:
    """A revocation after a round."""
    bench.keeper.revoke("ben", "no reason")
    acknowledge("revoked")


def nothing(bench: Bench) -> None:
    """The next keeper finishes by itself what was begun."""


def finished_round(bench: Bench) -> None:
    """A round that has ended."""
    submit(bench, lambda _: None)


SCENARIOS: dict[str, tuple[Callable[[Bench], None], Callable[[Bench, Acknowledge], None], Callable[[Bench], None]]] = {
    "submit": (nothing, submit, submit_again),
    "revoke": (finished_round, revoke, nothing),
}
"""What there is before, what is killed, and what is done afterwards."""


def found(bench: Bench) -> dict[str, Any]:
    """What a registry has, with what its artefacts hold."""
    registry = bench.keeper.registry
    rounds = {one.number: one.state for one in registry.rounds.all()}
    common = registry.plug_ins.in_force(AGGREGATE)
    kept = [path for path in (bench.folder / "c").rglob("*") if path.is_dir() and len(path.name) == 64]
    return {
        "submitted": [one.tenant for number in rounds for one in registry.submissions.of_round(number)],
        "states": {one.name: one.state for one in registry.tenants.all()},
        "rounds": list(rounds.values()),
        "aggregate": bench.value(AGGREGATE) if common is not None else None,
        "of": sorted(one.tenant for one in registry.plug_ins.made_from(common)) if common is not None else [],
        "whole": all(whole(path) for path in kept),
        "kept": len(kept),
        "unfinished": [path.name for path in bench.folder.rglob(".*")],
        "broken": bench.audit.broken,
    }


def whole(path: Path) -> bool:
    """Whether an artefact is there, and what its name says."""
    try:
        return read_artifact(path).digest == path.name
    except ArtifactRefused:
        return False


def apart(work: Callable[[Callable[[Any], None]], None]) -> tuple[int, list[Any], str]:
    """Runs something in a process of its own: how it ended, what it said, and its stderr."""
    (said, say), (err, complain) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(complain, 2)
        status = 1
        try:
            work(lambda value: (os.write(say, json.dumps(value).encode() + b"\n"), None)[1])
            status = 0
        finally:
            if status:
                sys.excepthook(*sys.exc_info())
            os._exit(status)
    os.close(say)
    os.close(complain)
    with os.fdopen(said) as lines, os.fdopen(err) as errors:
        values, text = [json.loads(line) for line in lines], errors.read()
    return os.waitpid(child, 0)[1], values, text


def main(tiny: TinyDeltas, work: Path, scenario: str) -> None:
    """Every crash point of a scenario, until one run comes through."""
    before, killed, after = SCENARIOS[scenario]
    prepared = work / "before"
    prepared.mkdir(parents=True)
    status, _, text = apart(lambda _: before(bench_on(tiny, prepared)))
    assert status == 0, text
    step, through = 0, False
    while not through:
        step += 1
        folder = work / str(step)
        shutil.copytree(prepared, folder)

        def run(say: Callable[[Any], None], folder: Path = folder, step: int = step) -> None:
            passed = kill_before(step)

            def acknowledge(what: str) -> None:
                passed(f"acknowledge {what}")
                say(what)

            killed(bench_on(tiny, folder), acknowledge)

        def look(say: Callable[[Any], None], folder: Path = folder) -> None:
            next_one = bench_on(tiny, folder)
            say(found(next_one))
            after(next_one)
            say(found(next_one))

        status, acknowledged, text = apart(run)
        through = status == 0
        assert through or os.WTERMSIG(status) == signal.SIGKILL, text
        ended, (at_once, later), error = apart(look)
        assert ended == 0, error
        one = {"step": step, "before": text, "acknowledged": acknowledged, "at_once": at_once, "later": later}
        print(json.dumps(one), flush=True)
        shutil.rmtree(folder)


if __name__ == "__main__":
    torch.set_num_threads(1)  # a process of several threads cannot be forked
    there = Path(sys.argv[1])
    main(TinyDeltas(there, read_artifact(there / "emulator")), Path(sys.argv[2]), sys.argv[3])
