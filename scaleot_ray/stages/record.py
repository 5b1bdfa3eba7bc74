"""Small JSON files that say which result lies beside them; written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from scaleot_ray.errors import NO_ROOM, ConfigError, ResourcesMissing


def write_record(path: Path, values: dict[str, Any]) -> None:
    """Writes ``values`` as JSON, in place of an earlier file.

    Raises:
        ResourcesMissing: the disk is full; an earlier file is still there.
        ConfigError: the folder may not be written.
    """
    text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        if error.errno in NO_ROOM:
            raise ResourcesMissing(f"{path}: no room to write it.", "Free disk space and run again.") from error
        raise ConfigError(
            f"{path}: cannot be written ({error.strerror or error}).", "Give a folder that can be written."
        ) from error


def read_record(path: Path) -> dict[str, Any]:
    """What :func:`write_record` wrote; empty where there is no such file, or none that can be read."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # then nothing is known to be finished, and it is done again
    return values if isinstance(values, dict) else {}
