"""A run's report as it may be committed: with its command and environment, and no path in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.command import portable_command
from benchmarks.environment import now
from scaleot_ray.cli.output import finite

SCHEMA = 1


def committed(
    benchmark: str, report: dict[str, Any], given: Sequence[str], made: dict[str, Any], paths: Sequence[str]
) -> dict[str, Any]:
    """What is committed of a run.

    Args:
        benchmark: the program ``python -m benchmarks.NAME``.
        report: schema ``scaleot.run/1`` of docs/json.md.
        given: arguments of the program.
        made: the environment, as it was when the run began.
        paths: its options whose value is a path.
    """
    return {
        "schema": SCHEMA,
        "benchmark": benchmark,
        "command": portable_command(f"benchmarks.{benchmark}", given, paths),
        "date": now(),
        "environment": made,
        "report": without_paths(finite(report)),
    }


def without_paths(value: Any) -> Any:
    """A report in which every path, absolute or to something that is here, is nothing but its last part."""
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    if isinstance(value, str) and "/" in value and (Path(value).is_absolute() or Path(value).exists()):
        return Path(value).name
    return value
