"""Writes docs/configuration.md from the settings classes: ``python docs/write_configuration.py``.

A test compares the file with what this prints, so it cannot fall behind.
"""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from scaleot_ray import config
from scaleot_ray.cli import settings as commands
from scaleot_ray.config import Settings

PAGE = Path(__file__).with_name("configuration.md")

SECTIONS: dict[str, list[tuple[str, type[Settings]]]] = {
    "A whole run": [
        ("`scaleot run CONFIG.yaml`, `jobs/federate.py`, `scaleot demo`", config.RunSettings),
        ("entries of `tenants`", config.TenantSettings),
    ],
    "Sections": [
        ("`model`", config.ModelSettings),
        ("`public`, `train`, `test`, `validation`", config.DataSettings),
        ("`stage_one`", config.StageOneSettings),
        ("`emulator`", config.EmulatorSettings),
        ("`tune`", config.TuneSettings),
        ("`rounds`", config.RoundSettings),
        ("`aggregation`", config.AggregationSettings),
        ("`placement`", config.PlacementSettings),
        ("`parallel`", config.ParallelSettings),
    ],
    "Single commands": [
        ("`scaleot build`, `jobs/build_emulator.py`", commands.BuildSettings),
        ("`scaleot tune`, `jobs/tune.py`", commands.TuneCommandSettings),
        ("`scaleot plug`, `jobs/plug_in.py`", commands.PlugSettings),
        ("`scaleot eval`, `jobs/evaluate.py`", commands.EvaluateSettings),
    ],
}

HEAD = """# Configuration

<!-- Written by `python docs/write_configuration.py` from the settings classes; do not edit by hand. -->

A run is one YAML file (`examples/` has some). Every key can also be given as `--set section.key=value`,
list entries by their index: `--set tenants.0.tune.steps=50`. Values are YAML; `5e-5` is a number. An
unknown key is an error that names the nearest known one. In Python, each section is a class of
`scaleot_ray.config` and may be used alone.
"""


def page() -> str:
    """The whole page as Markdown."""
    parts = [HEAD]
    for title, sections in SECTIONS.items():
        parts.append(f"\n## {title}\n")
        parts.extend(_section(where, section) for where, section in sections)
    return "".join(parts)


def _section(where: str, section: type[Settings]) -> str:
    lines = [f"\n### {where}\n\n{_words(section)}\n\n| key | values | default | meaning |\n|---|---|---|---|\n"]
    for name, field in section.model_fields.items():
        cells = [f"`{name}`", _values(field), _default(field), field.description or _meaning(field.annotation)]
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |\n")
    return "".join(lines)


def _words(section: type[Settings]) -> str:
    return " ".join((section.__doc__ or "").split()).replace("``", "`")


def _meaning(annotation: Any) -> str:
    """For a key that holds a section: what that section is."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return _words(annotation)
    return ""


def _values(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {getattr(item, name):g}"
        for item in field.metadata
        for name, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
        if getattr(item, name, None) is not None
    ]
    return ", ".join([_type(field.annotation), *bounds])


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(argument) for argument in arguments if argument is not type(None))
    if origin is dict:
        return "`{key: value}`"
    if origin is tuple:
        return f"list of {_type(arguments[0])}"
    if origin is not None and arguments:  # Annotated numbers inside a union
        return _type(arguments[0])
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return "section"
    return {str: "text", int: "whole number", float: "number", bool: "true, false"}[annotation]


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "**required**"
    if field.default is None or isinstance(field.default, Settings):
        return ""
    if isinstance(field.default, bool):
        return f"`{str(field.default).lower()}`"
    return f"`{field.default}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
