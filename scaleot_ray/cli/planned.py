"""What a build would need, for ``scaleot doctor --model`` and in front of every build."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaleot_ray.cli.output import Output
from scaleot_ray.cli.settings import BuildSettings, PlanSettings
from scaleot_ray.cli.tables import bytes_text

if TYPE_CHECKING:
    from rich.console import Console

    from scaleot_ray.planner.plan import Plan, Process, Room
    from scaleot_ray.planner.requirements import Build

_SMALL = 20_000_000
"""Parameters of a model that is built anywhere: to plan it would take longer than to load it."""


def refuse_what_cannot_fit(settings: BuildSettings) -> None:
    """Looks at a build before anything is loaded.

    Raises:
        ResourcesMissing: it needs more than this machine has; names the cheapest setting that fits.
        ConfigError: there is no such model, or no such emulator of it.
    """
    from scaleot_ray.families.size import model_size
    from scaleot_ray.planner.requirements import check_build
    from scaleot_ray.resources.session import ray_is_given

    if model_size(settings.model).parameters < _SMALL:
        return
    build = build_to_plan(settings)
    check_build(
        build, room_here(build, Path(settings.output)), cluster=settings.parallel is not None and ray_is_given()
    )


def build_to_plan(settings: BuildSettings | PlanSettings) -> Build:
    """The settings of a build, as the planner takes them.

    Raises:
        ConfigError: there is no such model, or DeepSpeed's configuration does not agree with the settings.
    """
    from scaleot_ray.families.loading import resolve_device
    from scaleot_ray.families.size import model_config
    from scaleot_ray.parallel.deepspeed_config import deepspeed_config
    from scaleot_ray.planner.requirements import Build

    config, stored = model_config(settings.model)
    parallel, given = settings.parallel, None
    if parallel is not None and parallel.deepspeed is not None:
        given = deepspeed_config(parallel, settings.stage_one, settings.model)
    gpu = resolve_device(settings.model.device).type == "cuda"
    return Build(
        config, stored, settings.model, settings.stage_one, settings.emulator, settings.stream, parallel, given, gpu
    )


def room_here(build: Build, output: Path) -> Room:
    """What this machine has for a build."""
    import torch

    from scaleot_ray.planner.plan import Room
    from scaleot_ray.resources.machine import free_disk, this_machine

    machine = this_machine()
    used = build.gpu or (build.parallel is not None and build.parallel.gpus > 0)
    gpu = torch.cuda.mem_get_info()[0] if used and torch.cuda.is_available() else None
    return Room(machine.memory, gpu, machine.shared_memory, free_disk(output))


def show_plan(settings: PlanSettings, room: dict[str, float | None], out: Output) -> bool:
    """Shows what a build and a data owner's tuning would need; gives whether both fit.

    Args:
        settings: of both.
        room: ``memory`` and ``gpu_memory`` of the machine that is meant, in bytes; None where it is this one.
    """
    from scaleot_ray.planner.plan import shortages
    from scaleot_ray.planner.requirements import cheapest

    build = build_to_plan(settings)
    here = room_here(build, Path())
    given = {key: int(value) for key, value in room.items() if value is not None}
    there = replace(here, **given)
    plan, tuning = build.plan(), build.tuning(settings.tune, build.gpu)
    missing = shortages(plan, there)
    found = cheapest(build, there) if missing else None
    document = {
        "schema": "scaleot.plan/1",
        "model": settings.model.path,
        "build": _as_json(plan),
        "tune": _process(tuning),
        "room": {**vars(there)},
        "fits": not missing,
        "shortages": {name: {"needed": needed, "there": has} for name, (needed, has) in missing.items()},
        "cheapest": {"options": found[0], "build": _as_json(found[1])} if found else None,
    }

    def show(console: Console) -> None:
        for process in (*plan.processes, tuning):
            console.print(_table(process))
        rows = {"emulator": plan.emulator, "disk": plan.disk, "object store": plan.object_store}
        for name, size in rows.items():
            if size:
                console.print(f"{name}: {bytes_text(size)}")
        for name, (needed, has) in missing.items():
            console.print(f"[bold red]does not fit[/]: {bytes_text(needed)} of {name}, there are {bytes_text(has)}")
        if not missing:
            console.print("[green]the build fits[/] into " + _room_text(there))
        elif found:
            console.print(f"fits with {found[0]}", markup=False, soft_wrap=True)
        else:
            console.print("no setting makes it fit: take a machine with more, or a smaller model")

    out.result(document, show)
    return not missing


def _table(process: Process) -> Any:
    from rich.table import Table

    several = f"{process.count} × " if process.count > 1 else ""
    table = Table(title=f"{several}{process.name}", title_justify="left", box=None, pad_edge=False)
    table.add_column("stage")
    table.add_column("memory", justify="right")
    if process.gpu:
        table.add_column("GPU", justify="right")
    table.add_column("of that")
    for phase in process.phases:
        parts = sorted({**phase.device, **phase.host}.items(), key=lambda part: -part[1])
        most = ", ".join(f"{name} {bytes_text(size)}" for name, size in parts[:3] if size)
        cells = [phase.name, bytes_text(process.memory_of(phase))]
        if process.gpu:
            cells.append(bytes_text(process.gpu_memory_of(phase)))
        table.add_row(*cells, most)
    return table


def _room_text(room: Room) -> str:
    names = {"memory": room.memory, "GPU memory": room.gpu_memory, "disk": room.disk}
    return ", ".join(f"{bytes_text(size)} of {name}" for name, size in names.items() if size is not None)


def _as_json(plan: Plan) -> dict[str, Any]:
    return {
        "processes": [_process(process) for process in plan.processes],
        "memory": plan.memory,
        "gpu_memory": plan.gpu_memory,
        "object_store": plan.object_store,
        "disk": plan.disk,
        "emulator": plan.emulator,
    }


def _process(process: Process) -> dict[str, Any]:
    return {
        "name": process.name,
        "count": process.count,
        "memory": process.memory,
        "gpu_memory": process.gpu_memory,
        "mapped": process.mapped,
        "phases": [
            {
                "name": phase.name,
                "memory": process.memory_of(phase),
                "gpu_memory": process.gpu_memory_of(phase),
                "parts": {**phase.device, **phase.host},
            }
            for phase in process.phases
        ],
    }
