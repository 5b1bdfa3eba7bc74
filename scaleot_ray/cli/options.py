"""Options that several commands share, each declared once."""

from __future__ import annotations

import difflib
from enum import Enum
from typing import Annotated, Any

import typer

from scaleot_ray.errors import ConfigError

ROWS = "How rows are read"
SHOWING = "What is shown"


class Format(str, Enum):
    """Form of the result on stdout."""

    text = "text"
    json = "json"


def set_option(example: str = "") -> Any:
    """``--set``, with an example of the command's own keys in its help."""
    such = f", e.g. {example}" if example else ""
    return typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help=f"Any setting by its dotted key{such}; may be given many times. "
        "Wins over the other options. All keys: docs/configuration.md.",
    )


def _choose_format(context: typer.Context, value: Format) -> Format:
    context.obj.json = value is Format.json
    return value


def _choose_debug(context: typer.Context, value: bool) -> bool:
    context.obj.debug = value
    return value


FormatOption = Annotated[
    Format,
    typer.Option(
        "--format",
        callback=_choose_format,
        is_eager=True,
        rich_help_panel=SHOWING,
        help="text: a table; json: exactly one JSON object on stdout (docs/json.md), everything else on stderr.",
    ),
]
DebugOption = Annotated[
    bool,
    typer.Option(
        "--debug",
        callback=_choose_debug,
        is_eager=True,
        rich_help_panel=SHOWING,
        help="Show the stack trace of an error and what the libraries print.",
    ),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result in --output.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; default: a GPU where there is one.")]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        help="Type the weights are loaded as: float32 (default), bfloat16, float16, float64; the same for build, "
        "eval and plug."
    ),
]
TaskOption = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=ROWS,
        help="text (default), completion, choice or chat; see docs/data.md.",
    ),
]
ColumnOption = Annotated[
    list[str],
    typer.Option(
        "--column",
        metavar="NAME=COLUMN",
        rich_help_panel=ROWS,
        help="Which column holds text, prompt, completion, messages, choices or label, e.g. prompt=question.",
    ),
]
TemplateOption = Annotated[
    str | None,
    typer.Option(
        "--prompt-template",
        rich_help_panel=ROWS,
        help="The prompt, with {column} for a column's value, e.g. 'Question: {question}\\nAnswer:'.",
    ),
]
ChoiceOption = Annotated[
    list[str],
    typer.Option(
        "--choice",
        rich_help_panel=ROWS,
        help="For --task choice with the same answers in every row: one answer, in the order of the labels; "
        "give it once per answer.",
    ),
]

_COLUMNS = ("text", "prompt", "completion", "messages", "choices", "label")


def data_section(
    path: str, task: str | None, columns: list[str], template: str | None, choices: list[str]
) -> dict[str, Any]:
    """The values of a ``DataSettings`` section out of the options above.

    Raises:
        ConfigError: a ``--column`` is no NAME=COLUMN pair, or names no column role.
    """
    section: dict[str, Any] = {"path": path}
    if task is not None:
        section["task"] = task
    if template is not None:
        section["prompt_template"] = template.replace("\\n", "\n")
    if choices:
        section["choices"] = list(choices)
    for item in columns:
        role, equals, column = item.partition("=")
        if not equals or not column:
            raise ConfigError(f"--column {item}: expected NAME=COLUMN.", "For example --column prompt=question.")
        if role not in _COLUMNS:
            near = difflib.get_close_matches(role, _COLUMNS, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known names: {', '.join(_COLUMNS)}."
            raise ConfigError(f"--column {item}: unknown name {role!r}.", hint)
        section[f"{role}_column"] = column
    return section


def given(**values: Any) -> dict[str, Any]:
    """The options that were given: a dict without those left at None."""
    return {name: value for name, value in values.items() if value is not None}
