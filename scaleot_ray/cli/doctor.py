"""``scaleot doctor``: is this machine ready, and for which models?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from scaleot_ray.cli.checks import Check, all_checks
from scaleot_ray.cli.options import DebugOption, DeviceOption, DtypeOption, Format, FormatOption, given, set_option
from scaleot_ray.cli.output import Output, working
from scaleot_ray.cli.planned import show_plan
from scaleot_ray.cli.settings import PlanSettings
from scaleot_ray.config import override, parse
from scaleot_ray.errors import ConfigError, ResourcesMissing

if TYPE_CHECKING:
    from rich.console import Console

_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def doctor_command(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option(help="Plan for this model instead: what a build and tuning would need.")
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Of scaleot build: leave the model on disk.")] = False,
    workers: Annotated[int | None, typer.Option(help="Of scaleot build: so many workers, on processors.")] = None,
    gpus: Annotated[int | None, typer.Option(help="The same with workers that have one GPU each.")] = None,
    zero: Annotated[int | None, typer.Option(help="With --workers or --gpus: the ZeRO stage, 0 to 3.")] = None,
    memory: Annotated[
        float | None, typer.Option(help="Memory of the machine that is meant, in 10^9 bytes; default: this one's.")
    ] = None,
    gpu_memory: Annotated[
        float | None, typer.Option(help="Memory of each of its GPUs, in 10^9 bytes; default: this one's.")
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    overrides: Annotated[list[str], set_option("stage_one.batch_size=2")] = [],  # noqa: B006  typer copies it
    format: FormatOption = Format.text,
    debug: DebugOption = False,
) -> None:
    """Check this machine, or what a model would need.

    Alone: packages, threads, memory, disk, Ray, GPU; it starts a small Ray for a
    moment. Each line is ok, warn or fail, with what to do about it.

    With --model: what `scaleot build` and `scaleot tune` would need, stage by
    stage; and where that is more than there is, the cheapest options that fit.

    Reads of a model its config alone, never its weights. Writes nothing.

    The exit code is 4 if a check fails or the build does not fit, else 0.

    Examples:

      scaleot doctor

      scaleot doctor --model my-7b --dtype bfloat16 --stream

      scaleot doctor --model my-70b --dtype bfloat16 --gpus 8 --zero 3 \\
          --gpu-memory 80 --set stage_one.batch_size=8
    """
    with working(context, "Run the same command again.") as out:
        group = given(workers=workers or gpus, zero=zero, gpus=1 if gpus else None)
        if model is not None:
            values = {"model": given(path=model, device=device, dtype=dtype), **given(stream=stream or None)}
            if group:
                values["parallel"] = group
            _plan(parse(PlanSettings, override(values, overrides), "scaleot doctor"), memory, gpu_memory, out)
            return
        planned: dict[str, object] = {
            "--stream": stream,
            "--memory": memory,
            "--gpu-memory": gpu_memory,
            "--device": device,
        }
        planned |= {"--dtype": dtype, "--set": overrides, "--workers, --gpus or --zero": group}
        if alone := [name for name, value in planned.items() if value]:
            raise ConfigError(
                f"{alone[0]}: says how a model is built, but there is no --model.",
                "Give --model, or leave it out to check this machine.",
            )
        checks: list[Check] = []
        for check in all_checks():
            checks.append(check)
            if out.json:
                out.note(f"{check.name}: {check.status}")
        failed = sum(check.status == "fail" for check in checks)
        document = {
            "schema": "scaleot.doctor/1",
            "ok": not failed,
            "checks": [check.as_json() for check in checks],
        }

        def show(console: Console) -> None:
            from rich.markup import escape

            for check in checks:
                style = _STYLES[check.status]
                console.print(f"[{style}]{check.status:>4}[/]  {escape(check.name):<14}{escape(check.found)}")
                if check.remedy:
                    console.print(f"      [dim]→ {escape(check.remedy)}[/]")

        out.result(document, show)
        if failed:
            raise typer.Exit(ResourcesMissing.exit_code)


def _plan(settings: PlanSettings, memory: float | None, gpu_memory: float | None, out: Output) -> None:
    room = {"memory": memory, "gpu_memory": gpu_memory}
    for key, value in room.items():
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"--{key.replace('_', '-')}: {value} is no size.", "Give a number of 10^9 bytes above 0.")
    if not show_plan(settings, {key: None if value is None else value * 1e9 for key, value in room.items()}, out):
        raise typer.Exit(ResourcesMissing.exit_code)
