"""The keys that docs/json.md gives to each schema, and how they differ from those of a result.

The page's own notation: ``a[].b`` for lists of objects, ``.c`` for a neighbour, ``*`` for names that are not fixed,
a link to a section for its keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from tests.cli.command import PROJECT


class JsonPage:
    """docs/json.md by sections; ``text`` in its place for tests of this class."""

    def __init__(self, text: str | None = None) -> None:
        text = (PROJECT / "docs" / "json.md").read_text(encoding="utf-8") if text is None else text
        self._bodies: dict[str, str] = {}
        self._anchors: dict[str, str] = {}
        for part in re.split(r"^## ", text, flags=re.M)[1:]:
            heading, _, body = part.partition("\n")
            self._anchors[re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-")] = body
            schema = re.search(r"`(scaleot\.\w+/\d+)`$", heading)
            if schema:
                self._bodies[schema.group(1)] = body

    @property
    def schemas(self) -> set[str]:
        """All schemas that have a section."""
        return set(self._bodies)

    def undocumented(self, document: dict[str, Any]) -> set[str]:
        """Keys of a result that its schema's section does not have."""
        known = self._keys(document["schema"])
        return {key for key in paths(document) if not any(covers(name, key) for name in known)}

    def gone(self, *documents: dict[str, Any]) -> set[str]:
        """Keys of a schema's section that none of its results has."""
        (schema,) = {document["schema"] for document in documents}
        found = {key for document in documents for key in paths(document)}
        return {name for name in self._keys(schema) if not any(covers(name, key) for key in found)}

    def _keys(self, schema: str) -> set[str]:
        keys = set(self._section(self._bodies[schema]))
        # What holds a documented key is documented too.
        inside = {key[: match.start()] for key in keys for match in re.finditer(r"\[\]\.|\.|\[\]$", key)}
        return {key.removesuffix("[]") for key in keys | inside}

    def _section(self, body: str) -> Iterator[str]:
        for line in body.splitlines():
            linked = re.findall(r"\]\(#([\w-]+)\)", line)
            keys = [""]
            if line.startswith("| `"):
                keys = re.findall(r"`([^`]+)`", line.split(" | ")[0])
                parent = keys[0].rpartition(".")[0]
                keys = [parent + key if key.startswith(".") else key for key in keys]
                yield from keys
            for anchor in linked:
                for inner in self._section(self._anchors[anchor]):
                    yield from (f"{key}.{inner}" if key else inner for key in keys)


def covers(name: str, key: str) -> bool:
    """Whether a documented name stands for a key."""
    return key.startswith(name[:-1]) if name.endswith(".*") else name == key


def paths(value: Any, prefix: str = "") -> Iterator[str]:
    """All keys of a result, each with the objects and lists it lies in."""
    if isinstance(value, dict):
        for key, item in value.items():
            path = f"{prefix}.{key}" if prefix else key
            yield path
            yield from paths(item, path)
    elif isinstance(value, list):
        for item in value:
            yield from paths(item, prefix + "[]")
