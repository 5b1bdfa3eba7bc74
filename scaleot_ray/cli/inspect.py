"""``scaleot inspect PATH``: what an artefact holds, or what an audit log says."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scaleot_ray.cli.options import DebugOption, Format, FormatOption
from scaleot_ray.cli.output import working
from scaleot_ray.cli.tables import bytes_text, cell
from scaleot_ray.errors import ArtifactRefused
from scaleot_ray.plain_text import plain_line, plain_text

if TYPE_CHECKING:
    from rich.console import Console

    from scaleot_ray.cli.output import Output


_LOG_LIMIT = 256 << 20
_LINE_LIMIT = 1 << 20
_FIRST_LINES = 64
"""Bytes of a log and of one line of it, and so many lines in which the first crossing must be."""
_WORDS = ("time", "sender", "recipient", "kind", "digest", "decision")


def inspect_command(
    context: typer.Context,
    path: Annotated[str, typer.Argument(help="Folder of an artefact, or an audit log.", metavar="PATH")],
    format: FormatOption = Format.text,
    debug: DebugOption = False,
) -> None:
    """Show what an artefact holds, or an audit log says, and check that it is whole.

    Reads a folder and checks every tensor and file against the manifest. Prints
    sizes, the layers as a picture, the share of the owner's parameters that leave
    verbatim, the base model, its licence, and the card.

    Reads an audit log, prints every crossing, and checks that each line follows
    the one that was written before it. Compare the head with the one in the run's
    report to see whether the last lines are missing.

    Writes nothing. Exit code 3: something is missing or was altered.

    Examples:

      scaleot inspect emulator

      scaleot inspect tuned/delta --format json

      scaleot inspect scaleot-runs/run/audit.jsonl
    """
    with working(context, "Run the same command again.") as out:
        if Path(path).is_file():
            _inspect_audit_log(out, Path(path))
        else:
            _inspect_artifact(out, Path(path))


def _inspect_artifact(out: Output, directory: Path) -> None:
    from scaleot_ray.artifacts.inspect import describe
    from scaleot_ray.artifacts.storage import read_artifact

    artifact = read_artifact(directory)
    card = artifact.files.get("README.md", b"").decode("utf-8", errors="replace")
    document: dict[str, Any] = {
        "schema": "scaleot.inspect/1",
        "directory": str(directory),
        "artifact": describe(artifact.manifest),
        "card": card or None,
    }

    def show(console: Console) -> None:
        show_artifact(console, document["artifact"])
        if card:
            console.rule("card")
            console.print(plain_text(card), markup=False)

    out.result(document, show)


def _inspect_audit_log(out: Output, path: Path) -> None:
    from scaleot_ray.artifacts.audit import AuditLog

    _check_looks_like_a_log(path)
    log = AuditLog(path)
    try:
        crossings = log.read()
    except RecursionError:
        raise _no_log(path) from None
    if not crossings:
        raise _no_log(path)
    for number, crossing in enumerate(crossings, start=1):
        _check_crossing(path, number, crossing)
    if log.broken:
        raise ArtifactRefused(
            f"{path}: lines are missing or altered before line {log.broken[0]}"
            + (f" (and before {len(log.broken) - 1} more)." if log.broken[1:] else "."),
            "Compare it with the other party's log; what this one says between those lines cannot be relied on.",
        )
    document = {
        "schema": "scaleot.audit/1",
        "path": str(path),
        "head": log.head(),
        "incomplete_lines": log.damaged,
        "crossings": crossings,
    }
    out.result(document, lambda console: _show_audit_log(console, document))


def _check_looks_like_a_log(path: Path) -> None:
    """Refuses another file before it is read whole: the log may be another party's."""
    found = False
    with path.open("rb") as file:
        if path.stat().st_size > _LOG_LIMIT:
            raise _no_log(path, f"has more than {bytes_text(_LOG_LIMIT)}")
        for number in itertools.count():
            line = file.readline(_LINE_LIMIT + 1)
            found = found or b'"decision"' in line
            if not found and (not line or number == _FIRST_LINES):
                raise _no_log(path)
            if len(line) > _LINE_LIMIT:
                raise _no_log(path, f"has a line of more than {bytes_text(_LINE_LIMIT)}")
            if not line:
                return


def _check_crossing(path: Path, number: int, crossing: Mapping[str, Any]) -> None:
    """Refuses a crossing with values that no log has; read() has seen that all keys are there."""
    wrong = [key for key in _WORDS if not isinstance(crossing[key], str)]
    if not isinstance(crossing["reason"], str | None):
        wrong.append("reason")
    size = crossing["bytes"]
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 1 << 63:
        wrong.append("bytes")
    if wrong:
        raise _no_log(path, f"its crossing {number} has a wrong value of {', '.join(map(repr, wrong))}")


def _no_log(path: Path, why: str = "") -> ArtifactRefused:
    return ArtifactRefused(
        f"{path}: is no audit log{': ' * bool(why)}{why}.", "Give audit.jsonl of a run, or the folder of an artefact."
    )


def _show_audit_log(console: Console, document: Mapping[str, Any]) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("time", "from", "to", "kind", "size", "digest", ""):
        table.add_column(name)
    for line in document["crossings"]:
        outcome = line["decision"] + (f": {line['reason']}" if line["reason"] else "")
        size, digest = bytes_text(line["bytes"]), line["digest"][:12]
        table.add_row(
            *map(cell, (line["time"], line["sender"], line["recipient"], line["kind"], size, digest, outcome))
        )
    console.print(table)
    if document["incomplete_lines"]:
        numbers = ", ".join(map(str, document["incomplete_lines"]))
        console.print(f"incomplete lines, of processes that died while writing: {numbers}", markup=False)
    lines = len(document["crossings"]) + len(document["incomplete_lines"])
    console.print(f"{lines} lines, none missing between them; head {document['head']}", markup=False, soft_wrap=True)


def show_artifact(console: Console, artifact: Mapping[str, Any]) -> None:
    """An artefact's description as a person reads it.

    Args:
        console: where to print.
        artifact: as :func:`scaleot_ray.artifacts.inspect.describe` gives it.
    """
    rows = [
        ("kind", artifact["kind"]),
        ("digest", artifact["digest"]),
        ("parent", artifact["parent_digest"]),
        ("created", f"{artifact['created']} by scaleot_ray {artifact['library_version']}"),
        ("base model", artifact["base_model"]),
        ("licence", _first_line(artifact["licence"])),
        ("model", _model(artifact)),
        (
            "size",
            f"{bytes_text(artifact['bytes'])}, {artifact['parameters']:,} parameters in {artifact['tensors']} tensors",
        ),
    ]
    rows += {"emulator": _emulator_rows, "delta": _delta_rows, "metrics": _metrics_rows}[artifact["kind"]](artifact)
    width = max(len(name) for name, _ in rows) + 2
    for name, value in rows:
        if value:
            console.print(plain_line(f"{name:<{width}}{value}"), markup=False, soft_wrap=True)
    if artifact["kind"] == "emulator":
        from scaleot_ray.artifacts.inspect import layer_picture

        console.print()
        console.print(layer_picture(artifact["layer_map"]), markup=False)


def _first_line(text: str | None) -> str:
    lines = (text or "").splitlines()
    return "" if not lines else lines[0] + (" …" if len(lines) > 1 else "")


def _model(artifact: Mapping[str, Any]) -> str:
    names = [artifact["model_type"], artifact["family"] and f"family {artifact['family']}", artifact["dtype"]]
    return ", ".join(str(name) for name in names if name)


def _emulator_rows(artifact: Mapping[str, Any]) -> list[tuple[str, str]]:
    harmonizer, margin = artifact["harmonizer"], artifact["loss_margin"]
    layers = artifact["layers_by_role"]
    replaced = layers["replaced"] + layers["dropped"]
    rows = [
        (
            "built",
            f"{artifact['builder']}, {artifact['plug_in_layers']} plug-in layers ({artifact['layout']}), "
            f"α {artifact['alpha']:g}, β {artifact['beta']:g}",
        ),
        ("layers", f"{sum(layers.values())}, of which {replaced} replaced and {layers['kept']} kept"),
        ("harmonizers", f"rank {harmonizer['rank']}, {harmonizer['activation']}" if harmonizer else ""),
        ("of the model", f"{bytes_text(artifact['bytes'])} of {bytes_text(artifact['full_bytes'])}"),
        (
            "verbatim",
            f"{artifact['verbatim_share']:.1%} of the owner's {artifact['full_parameters']:,} parameters unchanged",
        ),
    ]
    if margin is not None:
        rows.append(
            (
                "loss",
                f"{artifact['emulator_loss']:.3f} nats/token on public held-out text, full model "
                f"{artifact['full_loss']:.3f}, margin {margin:.3f}",
            )
        )
    if not artifact["protected"]:
        rows.append(("PROTECTION", "none: it hides nothing, and the gate never sends it"))
    return rows


def _delta_rows(artifact: Mapping[str, Any]) -> list[tuple[str, str]]:
    settings = ", ".join(f"{key} {value}" for key, value in artifact["settings"].items())
    return [
        ("method", artifact["method"] + (f" ({settings})" if settings else "")),
        ("layers", ", ".join(map(str, artifact["positions"]))),
    ]


def _metrics_rows(artifact: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, f"{value:.6g}") for name, value in artifact["values"].items()]
