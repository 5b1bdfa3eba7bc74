"""``scaleot plug``: the model owner puts a delta into the full model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scaleot_ray.cli.bars import ProgressBars
from scaleot_ray.cli.options import (
    DebugOption,
    DtypeOption,
    Format,
    FormatOption,
    OverwriteOption,
    given,
    set_option,
)
from scaleot_ray.cli.output import Output, working
from scaleot_ray.cli.settings import PlugSettings
from scaleot_ray.config import override, parse

if TYPE_CHECKING:
    from rich.console import Console


def plug_command(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="The full model: Hugging Face directory or id, or a .gguf file.")],
    emulator: Annotated[str, typer.Option(help="Folder of the emulator the delta was tuned on.")],
    delta: Annotated[str, typer.Option(help="Folder of the delta a data owner sent.")],
    output: Annotated[str, typer.Option(help="Folder of the checkpoint.")],
    name: Annotated[str | None, typer.Option(help="Name of the data owner who sent it, for the audit log.")] = None,
    scale: Annotated[float | None, typer.Option(help="Factor on the delta; 1 (default) takes it as it is.")] = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Write a PEFT adapter instead of a merged checkpoint (lora only).")
    ] = False,
    dtype: DtypeOption = None,
    overwrite: OverwriteOption = False,
    overrides: Annotated[list[str], set_option("model.device=cpu")] = [],  # noqa: B006  typer copies it
    format: FormatOption = Format.text,
    debug: DebugOption = False,
) -> None:
    """Put a delta into the full model and write the result.

    Reads the full model, the emulator's manifest and tokenizer and the delta, and
    takes the delta through the gate: it must belong to that emulator and hold
    nothing else; a line of audit.jsonl beside --output records that, or why it
    was refused. Weights, --dtype and tokenizer must be those of the build.
    Writes a Hugging Face checkpoint, or with --adapter a standard PEFT adapter.

    Examples:

      scaleot plug --model my-model --emulator emulator --delta tuned/delta \\
          --output my-model-tuned

      scaleot plug --model my-7b --emulator emulator --delta tuned/delta \\
          --output my-lora --adapter --dtype bfloat16
    """
    with working(context, "Run the same command again; nothing half-written is left.") as out:
        values = {
            "model": given(path=model, dtype=dtype),
            "emulator": emulator,
            "delta": delta,
            "output": output,
            "adapter": adapter,
            "overwrite": overwrite,
            **given(name=name, scale=scale),
        }
        plug(parse(PlugSettings, override(values, overrides), "scaleot plug"), out)


def plug(settings: PlugSettings, out: Output) -> None:
    """Plugs in and shows where the result is (the command and the job alike)."""
    start = time.monotonic()
    with ProgressBars():
        from scaleot_ray.artifacts.audit import MODEL_OWNER, data_owner
        from scaleot_ray.artifacts.crossing import audit_beside, receive
        from scaleot_ray.artifacts.storage import read_files, read_manifest
        from scaleot_ray.families.loading import load_base_model
        from scaleot_ray.plugin import check_form, check_place
        from scaleot_ray.processors import use_usable_cores
        from scaleot_ray.stages.plug import plug_in
        from scaleot_ray.tuning import from_artifact

        use_usable_cores()
        # Before anything is read, and the artefacts before a large model: what cannot work is refused at once.
        inputs = {"model.path": settings.model.path, "emulator": settings.emulator, "delta": settings.delta}
        check_place(settings.output, settings.overwrite, inputs)
        manifest, audit = read_manifest(settings.emulator), audit_beside(settings.output)
        files = read_files(settings.emulator, manifest)
        delta = receive(settings.delta, "delta", data_owner(settings.name), MODEL_OWNER, audit, parent=manifest)
        check_form(from_artifact(delta).method, settings.adapter)
        directory = plug_in(
            load_base_model(settings.model),
            delta,
            manifest,
            Path(settings.output),
            emulator_files=files,
            scale=settings.scale,
            adapter=settings.adapter,
            overwrite=settings.overwrite,
        )
    document: dict[str, Any] = {
        "schema": "scaleot.plug/1",
        "directory": str(directory),
        "form": "peft_adapter" if settings.adapter else "checkpoint",
        "delta": delta.digest,
        "audit": str(audit.path),
        "scale": settings.scale,
        "seconds": time.monotonic() - start,
    }

    def show(console: Console) -> None:
        what = "PEFT adapter" if settings.adapter else "checkpoint"
        console.print(f"{what} written to {directory}", markup=False, soft_wrap=True)

    out.result(document, show)
