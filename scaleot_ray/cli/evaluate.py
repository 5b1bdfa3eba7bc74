"""``scaleot eval``: the standard table for any model, artefacts and test rows."""

from __future__ import annotations

import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scaleot_ray.cli.bars import ProgressBars
from scaleot_ray.cli.options import (
    ChoiceOption,
    ColumnOption,
    DebugOption,
    DeviceOption,
    DtypeOption,
    Format,
    FormatOption,
    TaskOption,
    TemplateOption,
    data_section,
    given,
    set_option,
)
from scaleot_ray.cli.output import Output, working
from scaleot_ray.cli.settings import EvaluateSettings
from scaleot_ray.cli.tables import show_standard_table
from scaleot_ray.config import override, parse
from scaleot_ray.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from scaleot_ray.artifacts.artifact import Artifact


def evaluate_command(
    context: typer.Context,
    test: Annotated[str, typer.Option(help="Test rows: .txt, .jsonl, .csv, .parquet, .arrow or a dataset folder.")],
    model: Annotated[str | None, typer.Option(help="The full model: Hugging Face directory or id, or .gguf.")] = None,
    emulator: Annotated[str | None, typer.Option(help="Folder of an emulator.")] = None,
    delta: Annotated[str | None, typer.Option(help="Folder of a delta that was tuned on that emulator.")] = None,
    train: Annotated[
        str | None, typer.Option(help="Training rows; with --model and --emulator, adds the row full_tuned.")
    ] = None,
    validation: Annotated[
        str | None, typer.Option(help="Rows for tune.evaluate_every of full_tuned. Default: a part of --train.")
    ] = None,
    rows: Annotated[
        str | None, typer.Option(help="Rows of the table, by commas. Default: all that the inputs allow.")
    ] = None,
    folder: Annotated[
        str | None,
        typer.Option(help="Folder of finished rows and checkpoints; stays with the rows. Default: scaleot-runs/eval."),
    ] = None,
    task: TaskOption = None,
    column: ColumnOption = [],  # noqa: B006  typer copies it
    prompt_template: TemplateOption = None,
    choice: ChoiceOption = [],  # noqa: B006
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    overrides: Annotated[list[str], set_option("block_size=256")] = [],  # noqa: B006
    format: FormatOption = Format.text,
    debug: DebugOption = False,
) -> None:
    """Measure models on test rows and print the standard table.

    Reads what is given: the full model, an emulator, a delta, test rows. The
    table (or with --format json the object of docs/json.md) goes to stdout.
    Writes finished rows, and checkpoints of full_tuned while it is tuned, to
    --folder: the same command reuses them, other commands overwrite them. Give
    the --task and block_size that the data owner tuned with (--set
    block_size=N, tune.block_size there). Rows whose inputs are missing are left
    out; an input that no row can use is refused:

      full_zero_shot       --model

      emulator_zero_shot   --emulator

      emulator_tuned       --emulator --delta

      plug_in              --model --emulator --delta

      full_tuned           --model --emulator --train (tunes the full model)

    Examples:

      scaleot eval --model my-model --emulator emulator --delta tuned/delta \\
          --test test.jsonl

      scaleot eval --model my-model --test arc.jsonl --task choice --format json
    """
    again = "Run the same command again: finished rows are reused, full_tuned goes on from its last checkpoint."
    with working(context, again) as out:
        values: dict[str, Any] = {
            "test": data_section(test, task, column, prompt_template, choice),
            **given(emulator=emulator, delta=delta, device=device, folder=folder),
        }
        if model is not None:
            values["model"] = given(path=model, device=device, dtype=dtype)
        if train is not None:
            values["train"] = data_section(train, task, column, prompt_template, choice)
        if validation is not None:
            values["validation"] = data_section(validation, task, column, prompt_template, choice)
        if rows is not None:
            values["rows"] = [row.strip() for row in rows.split(",") if row.strip()]
        evaluate(parse(EvaluateSettings, override(values, overrides), "scaleot eval"), out)


def evaluate(settings: EvaluateSettings, out: Output) -> None:
    """Computes the table and shows it (the command and the job alike)."""
    start = time.monotonic()
    with ProgressBars() as bars:
        rows = choose_rows(settings)

        from scaleot_ray.artifacts.storage import read_artifact
        from scaleot_ray.data.dataset_key import check_sources
        from scaleot_ray.evaluation.table import table_json
        from scaleot_ray.families.loading import load_base_model
        from scaleot_ray.processors import use_usable_cores
        from scaleot_ray.stages.evaluate import evaluate_rows

        use_usable_cores()
        # Now, so that a mistyped path leaves no folder behind.
        check_sources({"test": settings.test, "train": settings.train, "validation": settings.validation})
        # The artefacts are read first: they are refused before a large model is loaded.
        emulator = read_artifact(settings.emulator, expected_kind="emulator") if settings.emulator else None
        delta = _delta(settings.delta, emulator) if settings.delta else None
        base = load_base_model(settings.model) if settings.model else None
        table = evaluate_rows(
            rows,
            name=settings.name,
            test=settings.test,
            base=base,
            emulator=emulator,
            delta=delta,
            train=settings.train,
            validation=settings.validation,
            tune=settings.tune,
            evaluate_examples=settings.evaluate_examples,
            batch_size=settings.batch_size,
            block_size=settings.block_size,
            device=settings.device,
            folder=_writable(Path(settings.folder)) if settings.folder else None,
            on_progress=bars,
        )
    document: dict[str, Any] = {
        "schema": "scaleot.eval/1",
        "model": settings.model.path if settings.model else None,
        "artifacts": {"emulator": emulator.digest if emulator else None, "delta": delta.digest if delta else None},
        "seconds": time.monotonic() - start,
        **table_json(table),
    }

    def show(console: Console) -> None:
        show_standard_table(console, [document])

    out.result(document, show)


def _delta(directory: str, emulator: Artifact | None) -> Artifact:
    """A delta, refused by its manifest before it is read where its emulator is there."""
    from scaleot_ray.artifacts.delta_gate import ANY_START
    from scaleot_ray.artifacts.gate import check_manifest
    from scaleot_ray.artifacts.storage import read_artifact

    gate = partial(check_manifest, parent=emulator.manifest, start=ANY_START) if emulator is not None else None
    return read_artifact(directory, expected_kind="delta", gate=gate)


def _writable(folder: Path) -> Path:
    """The folder, made and tried before a row is measured that could not be kept.

    Raises:
        ConfigError: it cannot be written.
    """
    folder = folder.expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise ConfigError(
            f"folder: {folder} cannot be written ({error.strerror or error}).",
            "Give --folder a folder that you may write to, or --set folder=null to keep nothing.",
        ) from error


_NEEDED_BY = {"delta": "emulator_tuned", "train": "full_tuned", "validation": "full_tuned"}
"""For each input that is of no use alone the row that uses it with the fewest others."""


def choose_rows(settings: EvaluateSettings) -> list[str]:
    """The rows asked for, or all that the inputs allow.

    Raises:
        ConfigError: a row that was asked for lacks an input, the inputs allow no row at all, or one of them
            is of no use without another.
    """
    from scaleot_ray.evaluation.table import ROWS
    from scaleot_ray.stages.evaluate import INPUTS

    options = {"base": "model"}  # the others are called as their options are
    missing: dict[str, list[str]] = {
        row: [name for item in INPUTS[row] if getattr(settings, name := options.get(item, item)) is None]
        for row in ROWS  # an aggregate is given as a delta like any other
    }
    if settings.rows is None:
        rows = [row for row, names in missing.items() if not names]
        if not rows:
            raise ConfigError(
                "eval: there is nothing to measure.",
                "Give --model, --emulator or both; `scaleot eval --help` says which row needs what.",
            )
        for name, row in _NEEDED_BY.items():
            if getattr(settings, name) is not None and missing[row]:
                others = " ".join(f"--{other}" for other in missing[row])
                raise ConfigError(f"{name}: no row uses it without {others}.", f"Add {others}, or leave out --{name}.")
        return rows
    for row in settings.rows:
        if missing[row]:
            needed = " ".join(f"--{name}" for name in missing[row])
            raise ConfigError(f"rows: {row} needs {needed}.", f"Add {needed}, or leave {row} out of --rows.")
    return list(settings.rows)
