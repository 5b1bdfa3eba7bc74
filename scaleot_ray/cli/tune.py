"""``scaleot tune``: a data owner tunes the plug-in layers on an emulator."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scaleot_ray.cli.bars import ProgressBars, clock
from scaleot_ray.cli.options import (
    ChoiceOption,
    ColumnOption,
    DebugOption,
    DeviceOption,
    Format,
    FormatOption,
    OverwriteOption,
    TaskOption,
    TemplateOption,
    data_section,
    given,
    set_option,
)
from scaleot_ray.cli.output import Output, working
from scaleot_ray.cli.settings import TuneCommandSettings
from scaleot_ray.cli.tables import bytes_text
from scaleot_ray.config import override, parse

if TYPE_CHECKING:
    from rich.console import Console


def tune_command(
    context: typer.Context,
    emulator: Annotated[str, typer.Option(help="Folder of the emulator the model owner sent.")],
    train: Annotated[
        str, typer.Option(help="Private training rows: .txt, .jsonl, .csv, .parquet, .arrow or a folder.")
    ],
    output: Annotated[str, typer.Option(help="Folder of the result; OUTPUT/delta and OUTPUT/metrics go back.")],
    test: Annotated[str | None, typer.Option(help="Held-out rows to measure before and after tuning.")] = None,
    validation: Annotated[
        str | None,
        typer.Option(help="Rows for tune.evaluate_every. Default: a part of --train (tune.validation_fraction)."),
    ] = None,
    task: TaskOption = None,
    column: ColumnOption = [],  # noqa: B006  typer copies it
    prompt_template: TemplateOption = None,
    choice: ChoiceOption = [],  # noqa: B006
    method: Annotated[str | None, typer.Option(help="layers (default), lora or bottleneck.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the data owner, for progress and records.")] = None,
    device: DeviceOption = None,
    overwrite: OverwriteOption = False,
    overrides: Annotated[list[str], set_option("tune.learning_rate=5e-5")] = [],  # noqa: B006
    format: FormatOption = Format.text,
    debug: DebugOption = False,
) -> None:
    """Tune the plug-in layers of an emulator on private data.

    Reads the emulator and the data; the original weights are not needed. Writes
    OUTPUT/delta (what tuning changed) and OUTPUT/metrics (a few numbers): send
    these two folders and nothing else. The emulator passes the gate when it is
    read, delta and metrics before they are written; OUTPUT/audit.jsonl records
    that, refusals too. An emulator that hides nothing is refused.

    Examples:

      scaleot tune --emulator emulator --train train.jsonl --output tuned

      scaleot tune --emulator emulator --train qa.jsonl --output tuned \\
          --task completion --column prompt=question --column completion=answer \\
          --method lora --set tune.steps=750 --set tune.block_size=512
    """
    with working(context, "Run the same command again: tuning goes on from its last checkpoint.") as out:
        values = {
            "emulator": emulator,
            "train": data_section(train, task, column, prompt_template, choice),
            "tune": given(method=method),
            "output": output,
            "overwrite": overwrite,
            **given(name=name, device=device),
        }
        if test is not None:
            values["test"] = data_section(test, task, column, prompt_template, choice)
        if validation is not None:
            values["validation"] = data_section(validation, task, column, prompt_template, choice)
        tune(parse(TuneCommandSettings, override(values, overrides), "scaleot tune"), out)


def tune(settings: TuneCommandSettings, out: Output) -> None:
    """Tunes and shows what came out (the command and the job alike)."""
    with ProgressBars() as bars:
        from scaleot_ray.artifacts.audit import MODEL_OWNER, data_owner
        from scaleot_ray.artifacts.crossing import audit_beside, receive
        from scaleot_ray.data.dataset_key import check_sources
        from scaleot_ray.processors import use_usable_cores
        from scaleot_ray.stages.tune import tune_emulator

        use_usable_cores()
        # Now, so that a mistyped path leaves nothing behind, no audit log either.
        check_sources({"train": settings.train, "test": settings.test, "validation": settings.validation})
        audit = audit_beside(Path(settings.output) / "delta")
        result = tune_emulator(
            receive(settings.emulator, "emulator", MODEL_OWNER, data_owner(settings.name), audit),
            settings.train,
            settings.tune,
            Path(settings.output),
            name=settings.name,
            test=settings.test,
            validation=settings.validation,
            device=settings.device,
            evaluate_examples=settings.evaluate_examples,
            overwrite=settings.overwrite,
            audit=audit,
            on_progress=bars,
        )
    document: dict[str, Any] = {
        "schema": "scaleot.tune/1",
        "directory": str(result.directory),
        "method": settings.tune.method,
        "delta": {"digest": result.delta.digest, "bytes": result.delta.nbytes},
        "metrics": result.metrics,
        "audit": str(audit.path),
        "steps": result.steps,
        "validation": [{"step": step, "loss": loss} for step, loss in result.validation],
        "seconds": result.seconds,
    }

    def show(console: Console) -> None:
        console.print(
            f"tuned {settings.tune.method} in {clock(result.seconds)}; "
            f"the delta is {bytes_text(result.delta.nbytes)} in {result.directory / 'delta'}",
            markup=False,
            soft_wrap=True,
        )
        for name, value in result.metrics.items():
            console.print(f"  {name}  {value:.4g}", markup=False)
        if result.validation:
            step, loss = min(result.validation, key=lambda evaluation: evaluation[1])
            taken = "" if settings.tune.patience is not None else "; without tune.patience the last weights are taken"
            console.print(f"  validation loss {loss:.4g} at step {step}, the best of {result.steps} steps{taken}")

    out.result(document, show)
