"""``scaleot demo``: the whole method on one machine, with a small model and text that is always there."""

from __future__ import annotations

import shutil
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from scaleot_ray.cli.options import DebugOption, Format, FormatOption, set_option
from scaleot_ray.cli.output import working
from scaleot_ray.cli.run import run
from scaleot_ray.config import RunSettings, override, parse
from scaleot_ray.errors import ConfigError

if TYPE_CHECKING:
    from scaleot_ray.data.demo_text import DemoText

MODEL = Path(".cache/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
MODEL_LICENCE = "Apache-2.0 (HuggingFaceTB/SmolLM2-135M-Instruct)"


def demo_command(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option(help=f"A Hugging Face directory or .gguf file. Default: {MODEL}, from `make demo`.")
    ] = None,
    output: Annotated[str, typer.Option(help="Folder of everything the demo writes.")] = "scaleot-runs/demo",
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over: forget stage 1 and results in --output.")] = False,
    overrides: Annotated[list[str], set_option("tune.learning_rate=5e-5")] = [],  # noqa: B006  typer copies it
    format: FormatOption = Format.text,
    debug: DebugOption = False,
) -> None:
    """See the whole method work: one model owner, two data owners, one table.

    Reads the model (135M parameters) and text that comes with Python: the
    language reference and docstrings of installed packages. Writes artefacts,
    audit log and report to --output. Takes 13 to 17 minutes and 6 GB of memory
    on 2 cores; a second call reuses stage 1.

    Examples:

      scaleot demo

      scaleot demo --format json > report.json

      scaleot demo --set emulator.alpha=0.5 --set tune.method=lora
    """
    with working(context, "Run the same command again: finished parts are reused, the rest goes on.") as out:
        settings = demo_settings(model, Path(output), overrides)
        if fresh:
            forget(Path(settings.output))
        run(settings, out)


def demo_settings(model: str | None, output: Path, overrides: list[str]) -> RunSettings:
    """The demo's run: ``demo.yaml`` with the model, and text written below ``output``.

    Raises:
        ConfigError: no model is there, or an override is refused.
    """
    section = model_section(model)

    from scaleot_ray.data.demo_text import write_demo_text

    text = write_demo_text(output / "text")
    values = {**demo_defaults(), "model": section, **text_sections(text), "output": str(output)}
    if (override({}, overrides).get("emulator") or {}).get("privacy") is not None:
        # The level chooses them; those of demo.yaml are not the user's.
        values["emulator"] = {key: value for key, value in values["emulator"].items() if key not in ("alpha", "beta")}
    return parse(RunSettings, override(values, overrides), "scaleot demo")


def forget(output: Path) -> None:
    """Removes what an earlier run left in ``output``, except its audit log; other folders are left alone.

    Raises:
        ConfigError: a run is working there.
    """
    from scaleot_ray.federation.folder import RunFolder

    folder = RunFolder(output)
    if not folder.audit.exists():
        return
    with folder.held():
        parts = (folder.emulator, folder.model_owner, folder.coordinator, output / "tenants", output / "evaluator")
        for part in parts:
            shutil.rmtree(part, ignore_errors=True)


def demo_defaults() -> dict[str, Any]:
    """The values of ``demo.yaml``."""
    text = resources.files("scaleot_ray.cli").joinpath("demo.yaml").read_text(encoding="utf-8")
    values: dict[str, Any] = yaml.safe_load(text)
    return values


def text_sections(text: DemoText) -> dict[str, Any]:
    """The sections ``public`` and ``tenants`` for the demo's text."""
    return {
        "public": {"path": str(text.public)},
        "tenants": [
            {"name": name, "train": {"path": str(train)}, "test": {"path": str(test)}}
            for name, (train, test) in text.tenants.items()
        ],
    }


def model_section(model: str | None) -> dict[str, Any]:
    """The section ``model``: the one given, or SmolLM2 where ``make demo`` puts it.

    Raises:
        ConfigError: none was given and SmolLM2 is not there.
    """
    path = Path(model) if model is not None else MODEL
    if path.name != MODEL.name:
        return {"path": model}
    if model is None and not path.exists():
        raise ConfigError(
            f"the demo's model {MODEL} is not here.",
            "Run `make demo` in the project's folder, which obtains it, or give --model DIRECTORY or FILE.gguf.",
        )
    return {"path": str(path), "licence": MODEL_LICENCE}
