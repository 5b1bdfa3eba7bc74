"""Whole runs with ever more data owners: what each further one costs, and what does not grow with their number.

The model is random and made here; every data owner tunes whole plug-in layers on one processor, and the mean of all
deltas is made at the end. The emulator is built once; every run finds it there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray._private.internal_api import get_memory_info_reply, get_state_from_address

from benchmarks.overhead.spread import ratios, spread
from benchmarks.tenants.options import add_run, tenant_numbers, tune_settings, whole_number
from benchmarks.tenants.run_processes import FIGURES, CoordinatorWatch
from benchmarks.tenants.subject import Subject
from scaleot_ray.artifacts.audit import AuditLog, data_owner
from scaleot_ray.errors import RunFailed
from scaleot_ray.federation.run import run_local
from scaleot_ray.progress import Progress

HELP = "whole runs with 1 to 32 data owners"

_SECONDS = ("tune", "total")
_MB, _MIB = 1e6, 2**20


def add_options(parser: argparse.ArgumentParser) -> None:
    """What may be chosen beside ``--output`` and ``--note``."""
    add_run(parser, steps=8)
    parser.add_argument("--tenants", default="1,2,4,8,16,32", help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=1, help="rounds of all numbers of data owners")


def measure(options: argparse.Namespace, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Makes model and emulator in ``folder``, and measures; gives what goes into the JSON."""
    numbers, tune = sorted(set(tenant_numbers(options))), tune_settings(options)
    repeats = whole_number(options, "repeats", 1, "each number of data owners is measured")
    say("making the model and its emulator")
    subject = Subject(folder, options.hidden, options.layers, tune)
    subject.check_room(numbers[-1])
    return {
        **subject.as_json(),
        "scaling": compare_scaling(subject, numbers, repeats, say),
    }


def compare_scaling(
    subject: Subject, tenants: Sequence[int], repeats: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Measures a run of each number of data owners, all numbers in turn, ``repeats`` times.

    Args:
        subject: what the runs are of.
        tenants: numbers of data owners, smallest first.
        repeats: rounds.
        say: hears of each run.

    Returns:
        ``runs``, for each number ``tenants``: ``at_once`` (most that were at their steps at the same time), ``seconds``
        (``tune``: from the first data owner's start to the last one's end; ``total``), ``coordinator`` (its peak
        memory in bytes, see :class:`CoordinatorWatch`), ``store_bytes`` (Ray's object store while data owners tune and
        none is done; None where one was done before it was looked at), ``crossed`` (bytes ``in`` and ``out`` by kind,
        of the data owner with most of it) and ``per_data_owner``, seconds ÷ data owners ÷ the same of the smallest
        number. ``coordinator_growth``: by figure of memory, the largest of all runs ÷ the smallest.

    Raises:
        ScaleOTError: a run failed, or was interrupted.
    """
    found: dict[int, list[dict[str, Any]]] = {number: [] for number in tenants}
    for repeat in range(repeats):
        for number in tenants:
            one = _measure(subject, number)
            found[number].append(one)
            say(
                f"scaling, {number} data owners, round {repeat + 1} of {repeats}: tuning {one['tune']:.1f} s, in all "
                f"{one['total']:.1f} s, coordinator {one['uss'] / _MIB:.0f} MiB"
            )
    peaks = {key: [one[key] for results in found.values() for one in results] for key in FIGURES}
    return {
        "compared_with": tenants[0],
        "runs": [_summary(number, results, tenants[0], found[tenants[0]]) for number, results in found.items()],
        "coordinator_growth": {key: max(values) / min(values) for key, values in peaks.items()},
    }


def _summary(
    number: int, results: Sequence[dict[str, Any]], least: int, first: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    def values(key: str) -> list[float]:
        return [one[key] for one in results]

    return {
        "tenants": number,
        "at_once": max(one["at_once"] for one in results),
        "seconds": {key: spread(values(key)) for key in _SECONDS},
        "coordinator": {key: spread(values(key)) for key in FIGURES},
        "store_bytes": results[0]["store_bytes"],
        "crossed": results[0]["crossed"],
        "per_data_owner": {
            key: ratios([value / number for value in values(key)], [one[key] / least for one in first])
            for key in _SECONDS
        },
    }


def _measure(subject: Subject, number: int) -> dict[str, Any]:
    seen = _Seen()
    with subject.run_of(number) as settings, CoordinatorWatch() as watch:
        report = run_local(settings, on_progress=seen.progress)
        entries = AuditLog(report.audit).read()
    if not watch.looks:
        raise RunFailed("The run was over before its coordinator was looked at.", "Give more --steps.")
    names = [data_owner(tenant.name) for tenant in settings.tenants]
    return {
        **{key: report.seconds[key] for key in _SECONDS},
        **watch.peak,
        "at_once": seen.at_once,
        "store_bytes": seen.store_bytes,
        "crossed": crossed(entries, names),
    }


def crossed(entries: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, dict[str, int]]:
    """Bytes that crossed to (``in``) and from (``out``) data owners, by kind; of the one with most of it.

    Args:
        entries: of an audit log; what was refused did not cross.
        names: the data owners, as the log calls them.
    """
    found: dict[str, dict[str, int]] = {}
    for way, party in (("in", "recipient"), ("out", "sender")):
        sums = {name: dict[str, int]() for name in names}
        for entry in entries:
            if entry["decision"] != "refused" and entry[party] in sums:
                own = sums[entry[party]]
                own[entry["kind"]] = own.get(entry["kind"], 0) + entry["bytes"]
        kinds = sorted({kind for own in sums.values() for kind in own})
        found[way] = {kind: max(own.get(kind, 0) for own in sums.values()) for kind in kinds}
    return found


class _Seen:
    """What a run's driver hears of steps, and what is in the object store then."""

    def __init__(self) -> None:
        self.at_once = 0
        self.store_bytes: int | None = None
        self._tuning: set[str] = set()
        self._one_is_done = False

    def progress(self, told: Progress) -> None:
        if told.tenant is None or told.stage != f"tune {told.tenant}":
            return
        self._tuning.add(told.tenant)
        self.at_once = max(self.at_once, len(self._tuning))
        if told.step >= told.steps:  # its delta may be there any time now
            self._tuning.discard(told.tenant)
            self._one_is_done = True
        if not self._one_is_done:
            self.store_bytes = max(self.store_bytes or 0, _store_bytes())


def _store_bytes() -> int:
    # No public call has it where there is no dashboard.
    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    return int(get_memory_info_reply(state).store_stats.object_store_bytes_used)


def lines(document: Mapping[str, Any]) -> list[str]:
    """The table that is printed."""
    found, emulator = document["scaling"], document["emulator"]["bytes"]
    rows = [
        "| data owners | at once | tuning, s | in all, s | per data owner ÷ alone: tuning | in all "
        "| coordinator: USS, MiB | PSS | anonymous | store ÷ emulator | in, MB | out, MB |",
        "|" + "---|" * 12,
    ]
    for run in found["runs"]:
        tune, total = (f"{run['seconds'][key]['median']:.1f} | " for key in _SECONDS)
        shares = " | ".join(f"{run['per_data_owner'][key]['median']:.3f}" for key in _SECONDS)
        memory = " | ".join(f"{run['coordinator'][key]['median'] / _MIB:.0f}" for key in FIGURES)
        store = f"{run['store_bytes'] / emulator:.3f}" if run["store_bytes"] is not None else ""
        way = " | ".join(f"{sum(run['crossed'][key].values()) / _MB:.2f}" for key in ("in", "out"))
        rows.append(f"| {run['tenants']} | {run['at_once']} | {tune}{total}{shares} | {memory} | {store} | {way} |")
    growth = ", ".join(f"{key} {value:.3f}" for key, value in found["coordinator_growth"].items())
    return [*rows, "", f"coordinator's peak, largest ÷ smallest: {growth}"]
