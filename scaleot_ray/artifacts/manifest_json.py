"""A manifest as a file: strict JSON in, readable JSON out."""

from __future__ import annotations

import json
import re
from typing import Any

from pydantic import ValidationError

from scaleot_ray.artifacts.manifest import CONTENT, KINDS, MANIFEST_FILE, SCHEMA_VERSION, Kind, Manifest
from scaleot_ray.artifacts.untrusted import quoted, shortened
from scaleot_ray.errors import ArtifactRefused

MANIFEST_LIMIT = 64 << 20
"""Bytes of the largest manifest that is read; 100,000 tensors need about 30 MB."""
SENT_LIMIT = 4 << 20
"""Bytes of the largest manifest of a delta or of metrics that is received. A LoRA delta of all seven projections in all
80 layers of a 70B model has 1,120 tensors, which need about 400 kB."""

_PLAIN_KEY = re.compile(r"[A-Za-z0-9_.+/-]{1,128}")
_REMEDY = "Fetch the artefact again from its sender, or build it again; manifests are not edited by hand."


def render_manifest(manifest: Manifest) -> bytes:
    """The text of ``manifest.json``."""
    return _text(manifest.model_dump(mode="json"))


def parse_manifest(data: bytes) -> Manifest:
    """The manifest in the text of a ``manifest.json``.

    Raises:
        ArtifactRefused: the text is too long or no strict JSON (a key twice, NaN), comes from a newer
            schema, or a field is unknown, missing or not what it must be; the message names the field.
    """
    _check_length(data, MANIFEST_LIMIT)
    values = _strict_json(data)
    version, kind = values.get("schema_version"), values.get("kind")
    if type(version) is int and version > SCHEMA_VERSION:
        raise ArtifactRefused(
            f"{MANIFEST_FILE}: schema_version is {quoted(version)}, newer than this library reads ({SCHEMA_VERSION}).",
            "Upgrade scaleot_ray to the version that wrote the artefact, or later.",
        )
    if type(version) is not int or version != SCHEMA_VERSION:
        raise _refused(f"schema_version is {quoted(version)}, expected {SCHEMA_VERSION}")
    if not isinstance(kind, str) or kind not in KINDS:
        raise _refused(f"kind is {quoted(kind)}, expected one of {', '.join(KINDS)}")
    try:
        # Alone first: the union of contents would report the fields of the kinds it is not.
        CONTENT[kind].model_validate_json(json.dumps(values.get("content")), strict=True)
    except ValidationError as error:
        raise _refused(_first(error, ("content",))) from None
    try:
        return Manifest.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise _refused(_first(error, ())) from None


def parse_sent(data: bytes, expected_kind: Kind | None) -> Manifest:
    """The manifest of what another party sent, which is to be of a kind (None: of any).

    That of a delta or of metrics has to be written as :func:`render_manifest` does, byte for byte: spaces, escapes and
    spare digits say nothing, so they could say anything. Fields that an earlier version did not have may be missing.

    Raises:
        ArtifactRefused: as :func:`parse_manifest`, or that of a delta or of metrics is too long or written otherwise.
    """
    _check_length(data, sent_limit(expected_kind))
    manifest = parse_manifest(data)
    if manifest.kind != "emulator":
        _check_length(data, SENT_LIMIT)
        expected = _text(manifest.model_dump(mode="json", exclude_unset=True))
        if data != expected:
            raise _refused(f"is not written as scaleot_ray writes it ({len(data)} bytes, expected {len(expected)})")
    return manifest


def sent_limit(expected_kind: Kind | None) -> int:
    """Bytes of the largest manifest that another party may send of what is to be of a kind (None: of any)."""
    return SENT_LIMIT if expected_kind in ("delta", "metrics") else MANIFEST_LIMIT


def _text(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()


def _strict_json(data: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise _refused(f"the key {quoted(key)} is there twice")
            result[key] = value
        return result

    def constant(name: str) -> None:
        raise _refused(f"{name} is no JSON number")

    try:
        values = json.loads(data.decode("utf-8"), object_pairs_hook=once, parse_constant=constant)
        json.dumps(values, allow_nan=False)  # 1e999 reads as infinity
    except (ValueError, RecursionError) as error:
        raise _refused(f"is no valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise _refused("holds no JSON object")
    return values


def _check_length(data: bytes, limit: int) -> None:
    if len(data) > limit:
        raise _refused(f"has more than {limit} bytes")


def _first(error: ValidationError, place: tuple[str, ...]) -> str:
    first = error.errors()[0]
    where = shortened(".".join(_key(part) for part in (*place, *first["loc"])))
    message = shortened(first["msg"].removeprefix("Value error, "))
    return f"{where}: {message}" if where else message


def _key(part: str | int) -> str:
    text = str(part)
    return text if _PLAIN_KEY.fullmatch(text) else quoted(text)


def _refused(problem: str) -> ArtifactRefused:
    return ArtifactRefused(f"{MANIFEST_FILE}: {problem}.", _REMEDY)
