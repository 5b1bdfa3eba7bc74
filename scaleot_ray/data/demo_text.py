"""The demo's text: one public part and two data owners' parts, real, offline, and disjoint.

- ``language-reference``: the Python language reference (``pydoc_data.topics``), section by section;
- ``library-docs``: docstrings of numpy (and pandas, where numpy's are too few);
- public: what the model owner might hold of the same broad domain: the remaining sections of the
  reference, docstrings of the standard library and of other packages.

No passage of 50 characters, white space aside, is in two of the parts. The same Python, packages and seed
give the same files.
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scaleot_ray.data.installed_text import (
    SHORTEST,
    docstrings,
    drawn_order,
    language_reference,
    package_folder,
    standard_library,
)
from scaleot_ray.data.passages import Hashes, collapsed, paragraphs, passage_hashes, without_passages
from scaleot_ray.errors import DataError, ResourcesMissing

# Characters to take for each part, and the least that must be left of it.
TEST, LEAST_TEST = 50_000, 40_000
LONGEST_TEST_DOCUMENT = 6_000  # many short documents say more than a few long ones
TRAIN = {"language-reference": 175_000, "library-docs": 300_000}
LEAST_TRAIN = 150_000
LEAST_PUBLIC = 150_000
LIBRARY = ("numpy", "pandas")
PUBLIC = {"pandas": 120_000, "networkx": 120_000, "sympy": 60_000, "torch": 60_000}
PUBLIC_STANDARD_LIBRARY = 220_000


@dataclass(frozen=True)
class DemoText:
    """The files of the demo, JSON Lines with one column ``text``.

    Attributes:
        public: the model owner's text.
        tenants: by name of the data owner, its train and its test text.
    """

    public: Path
    tenants: dict[str, tuple[Path, Path]]


def write_demo_text(directory: Path, seed: int = 0) -> DemoText:
    """Writes the demo's text below ``directory``, replacing what an earlier call wrote there.

    Args:
        directory: made where it is missing.
        seed: which documents go to which part.

    Raises:
        DataError: this Python has too little text of a kind.
        ResourcesMissing: the disk is full.
    """
    parts = demo_parts(seed)
    directory = Path(directory)
    files = {name: directory / f"{name}.jsonl" for name in parts}
    for name, documents in parts.items():
        _write(files[name], documents)
    return DemoText(files["public"], {name: (files[f"{name}-train"], files[f"{name}-test"]) for name in TRAIN})


def demo_parts(seed: int = 0) -> dict[str, list[str]]:
    """The documents of each part: ``public`` and, per data owner, ``NAME-train`` and ``NAME-test``.

    Parts are settled in the order of what matters most: tests first, then training text, public text
    last; each gives up the paragraphs that it shares with an earlier one.

    Raises:
        DataError: this Python has too little text of a kind.
    """
    pools = {
        "language-reference": _drawn(language_reference(), seed),
        "library-docs": _drawn(_library(3 * (TEST + TRAIN["library-docs"]) // 2, seed), seed),
    }
    tests = {f"{name}-test": _take(pool, TEST, LONGEST_TEST_DOCUMENT) for name, pool in pools.items()}
    trains = {f"{name}-train": _take(pool, TRAIN[name]) for name, pool in pools.items()}
    public = list(pools["language-reference"])
    for folder, characters in _public_folders():
        public += _take(_drawn(docstrings(folder, characters, seed), seed), characters)
    parts = disjoint({**tests, **trains, "public": _drawn(public, seed)})
    for name, documents in parts.items():
        least = LEAST_PUBLIC if name == "public" else LEAST_TEST if name in tests else LEAST_TRAIN
        found = sum(map(len, documents))
        if found < least:
            raise DataError(
                f"demo text: this Python has {found} characters for {name}, expected at least {least}.",
                "Use a complete Python (with pydoc_data) and packages installed with their sources.",
            )
    return parts


def disjoint(parts: dict[str, list[str]]) -> dict[str, list[str]]:
    """The parts without the paragraphs of which a passage is in an earlier part, in the given order."""
    taken: Hashes = np.empty(0, dtype=np.uint64)
    result = {}
    for name, documents in parts.items():
        kept = without_passages([paragraphs(text) for text in documents], taken, SHORTEST)
        result[name] = ["\n\n".join(document).strip() for document in kept]
        taken = np.concatenate([taken, passage_hashes(collapsed(result[name]))])
    return result


def _library(characters: int, seed: int) -> list[str]:
    texts: list[str] = []
    for package in LIBRARY:
        folder = package_folder(package)
        missing = characters - sum(map(len, texts))
        if folder is not None and missing > 0:
            texts += docstrings(folder, missing, seed)
    return texts


def _public_folders() -> list[tuple[Path, int]]:
    packages = [(package_folder(package), characters) for package, characters in PUBLIC.items()]
    return [
        (standard_library(), PUBLIC_STANDARD_LIBRARY),
        *((folder, characters) for folder, characters in packages if folder is not None),
    ]


def _drawn(texts: Sequence[str], seed: int) -> list[str]:
    return sorted(texts, key=lambda text: drawn_order(seed, text))


def _take(pool: list[str], characters: int, longest: int | None = None) -> list[str]:
    """Moves documents, none longer than ``longest``, from ``pool`` to the result until it has so many characters."""
    total = 0
    taken: list[str] = []
    for text in list(pool):
        if total >= characters:
            break
        if longest is None or len(text) <= longest:
            pool.remove(text)
            taken.append(text)
            total += len(text)
    return taken


def _write(path: Path, documents: Sequence[str]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with open(handle, "w", encoding="utf-8") as file:
                for text in documents:
                    file.write(json.dumps({"text": text}) + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourcesMissing(
                f"{path}: the disk is full.", "Free about 2 MB, or choose a directory on another disk."
            ) from error
        raise DataError(
            f"{path}: cannot be written ({error.strerror}).", "Choose a folder that you may write to."
        ) from error
