"""``scaleot build``: the model owner makes an emulator."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scaleot_ray.cli.bars import ProgressBars
from scaleot_ray.cli.inspect import show_artifact
from scaleot_ray.cli.options import (
    ColumnOption,
    DebugOption,
    DeviceOption,
    DtypeOption,
    Format,
    FormatOption,
    OverwriteOption,
    data_section,
    given,
    set_option,
)
from scaleot_ray.cli.output import Output, working
from scaleot_ray.cli.planned import refuse_what_cannot_fit
from scaleot_ray.cli.settings import BuildSettings
from scaleot_ray.cli.tables import privacy_text
from scaleot_ray.config import override, parse
from scaleot_ray.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console


def build_command(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="The full model: Hugging Face directory or id, or a .gguf file.")],
    public: Annotated[str, typer.Option(help="Public text: .txt, .jsonl, .csv, .parquet, .arrow or a dataset folder.")],
    output: Annotated[str, typer.Option(help="Folder of the emulator; what a data owner receives.")],
    alpha: Annotated[float | None, typer.Option(help="Fraction α of the middle layers to replace, 0 to 1.")] = None,
    beta: Annotated[float | None, typer.Option(help="Rank reduction β of the kept layers' attention, 0 to 1.")] = None,
    plug_in_layers: Annotated[int | None, typer.Option(help="How many layers data owners tune, N_a.")] = None,
    layout: Annotated[
        str | None, typer.Option(help="Where the plug-in layers are: ends, spread, last or block.")
    ] = None,
    privacy: Annotated[
        str | None, typer.Option(help="low, medium or high: chooses α and β from what must stay hidden.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="paper: the ScaleOT paper's own choices; default: the best found.")
    ] = None,
    builder: Annotated[str | None, typer.Option(help="scaleot (default) or uniform_drop, for comparison.")] = None,
    cache: Annotated[
        str | None, typer.Option(help="Folder of stage-1 results; stays with the owner. Default: OUTPUT-cache.")
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Leave the model on disk: memory for one decoder layer at a time.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(help="Make stage 1's steps by so many workers on Ray, under DeepSpeed.")
    ] = None,
    zero: Annotated[
        int | None, typer.Option(help="With --workers: the ZeRO stage, 0 to 3; 3 spreads the model over them.")
    ] = None,
    column: ColumnOption = [],  # noqa: B006  typer copies it
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    overwrite: OverwriteOption = False,
    overrides: Annotated[list[str], set_option("stage_one.steps=50")] = [],  # noqa: B006
    format: FormatOption = Format.text,
    debug: DebugOption = False,
) -> None:
    """Build an emulator from a full model and public text.

    Reads the model and the public text. Writes the emulator to --output and
    stage-1 results (harmonizers, layer scores, checkpoints) to --cache; they are
    reused for every other α and β. The emulator passes the gate first, and a line
    of audit.jsonl beside --output says so. An emulator that hides nothing
    (emulator.allow_unprotected) gets no line: it must not be sent.

    Examples:

      scaleot build --model my-model --public wiki.jsonl --output emulator

      scaleot build --model model.gguf --public notes.txt --output emulator \\
          --alpha 0.5 --beta 0.8 --dtype bfloat16

      scaleot build --model my-7b --public wiki.jsonl --output emulator \\
          --stream --dtype bfloat16 --set emulator.fit_tokens=8192

      scaleot build --model my-70b --public wiki.jsonl --output emulator \\
          --stream --dtype bfloat16 --workers 8 --zero 3 \\
          --set parallel.gpus=1 --set stage_one.batch_size=8
    """
    with working(context, "Run the same command again: it goes on from its last checkpoint.") as out:
        values = {
            "model": given(path=model, device=device, dtype=dtype),
            "public": data_section(public, None, column, None, []),
            "emulator": given(
                alpha=alpha, beta=beta, plug_in_layers=plug_in_layers, layout=layout, privacy=privacy, builder=builder
            ),
            "output": output,
            "overwrite": overwrite,
            **given(cache=cache, recipe=recipe, stream=stream or None),
        }
        if parallel := given(workers=workers, zero=zero):
            values["parallel"] = parallel
        build_emulator(parse(BuildSettings, override(values, overrides), "scaleot build"), out)


def build_emulator(settings: BuildSettings, out: Output) -> None:
    """Builds an emulator and shows what it is (the command and the job alike).

    Raises:
        ConfigError: ``settings.output`` names no folder of the emulator's own, or what it does is refused.
    """
    output = Path(settings.output)
    if output.name in ("", ".."):
        raise ConfigError(
            f"output: {settings.output!r} is no name for a folder of the emulator's own.",
            "Give the path of a new folder, e.g. emulator.",
        )
    with ProgressBars() as bars:
        from scaleot_ray.artifacts.crossing import audit_beside
        from scaleot_ray.artifacts.inspect import describe
        from scaleot_ray.data.dataset_key import check_sources
        from scaleot_ray.processors import use_usable_cores
        from scaleot_ray.stages.build import build

        use_usable_cores()
        check_sources({"public": settings.public})  # loading a large model takes longer than finding a mistyped path
        refuse_what_cannot_fit(settings)
        take_steps = None
        if settings.parallel is not None:
            from scaleot_ray.parallel.build import steps_by_group

            take_steps = steps_by_group(
                settings.parallel, settings.model, settings.public, settings.stage_one, out.debug, out.listen
            )
        audit = audit_beside(output)
        result = build(
            settings.model,
            settings.public,
            settings.stage_one,
            settings.emulator,
            output,
            cache=Path(settings.cache) if settings.cache else output.with_name(output.name + "-cache"),
            resume=True,
            overwrite=settings.overwrite,
            stream=settings.stream,
            take_steps=take_steps,
            audit=audit,
            on_progress=bars,
        )
    protected = describe(result.manifest)["protected"]
    if not protected:
        out.note(f"warning: {result.directory} must not be sent: this emulator hides nothing.")
    document: dict[str, Any] = {
        "schema": "scaleot.build/1",
        "directory": str(result.directory),
        "artifact": describe(result.manifest),
        "privacy": result.privacy,
        "reused_stage_one": result.reused_stage_one,
        "audit": str(audit.path) if protected else None,
        "seconds": result.seconds,
    }

    def show(console: Console) -> None:
        show_artifact(console, document["artifact"])
        if result.privacy is not None:
            console.print(privacy_text(result.privacy), markup=False, soft_wrap=True)
        ending = "" if protected else " for experiments; it must not be sent"
        console.print(f"written to {document['directory']}{ending}", markup=False, soft_wrap=True)

    out.result(document, show)
