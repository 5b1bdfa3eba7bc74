"""Real text that comes with any Python: the language reference and docstrings of what is installed.

Packages are found and their sources parsed; none is imported, and nothing of them runs.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

SHORTEST = 200
_LARGEST_FILE = 1 << 20
_LEFT_OUT = {
    *("test", "tests", "testing", "_vendor", "vendor", "vendored", "site-packages", "dist-packages"),
    *("idlelib", "lib2to3", "turtledemo", "pydoc_data", "ensurepip", "__pycache__"),
}
_HEADING = re.compile(r"^(?=\S.*\n([*=\-~^])\1{3,}$)", re.MULTILINE)
_UNDERLINE = re.compile(r"^([*=\-~^])\1{3,}$", re.MULTILINE)


def language_reference() -> list[str]:
    """The sections of the Python language reference, as ``pydoc`` carries it; [] where it is left out.

    Several topics repeat the sections of others at another level of heading; each section comes once.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return []
    sections = []
    for _, topic in sorted(topics.items()):
        for section in _HEADING.split(topic)[::2]:
            text = _UNDERLINE.sub(lambda line: "=" * len(line[0]), section).strip()
            sections.append(re.sub(r"\n{3,}", "\n\n", text))
    return _proper(sections)


def standard_library() -> Path:
    """The folder of the standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def package_folder(name: str) -> Path | None:
    """The folder of an installed top-level package, found without importing it; None where it is not installed."""
    found = importlib.util.find_spec(name)
    places = list(found.submodule_search_locations or []) if found is not None else []
    return Path(places[0]) if places else None


def docstrings(folder: Path, characters: int, seed: int) -> list[str]:
    """Docstrings below ``folder``, of files in an order drawn from ``seed``, until they have so many characters.

    Each has at least 200 characters and no common indentation; repeated ones come once.
    """
    files = [path.relative_to(folder) for path in folder.rglob("*.py")]
    files = [name for name in files if not _LEFT_OUT & set(name.parts)]
    texts: dict[str, None] = {}
    total = 0
    for name in sorted(files, key=lambda name: drawn_order(seed, name.as_posix())):
        for text in _proper(list(_in_file(folder / name))):
            if text not in texts:
                texts[text] = None
                total += len(text)
        if total >= characters:
            break
    return list(texts)


def drawn_order(seed: int, text: str) -> bytes:
    """A sort key that shuffles texts in the same way on every machine."""
    return hashlib.sha256(f"{seed} {text}".encode(errors="surrogatepass")).digest()


def _in_file(path: Path) -> Iterator[str]:
    if path.stat().st_size > _LARGEST_FILE:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escapes
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError):
        return  # sources for another Python, such as templates
    for node in _statements(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node, clean=True)
            if text is not None:
                yield text.strip()


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    # Docstrings hang on statements; ast.walk would go through every expression as well, most of the time.
    yield node
    for block in ("body", "orelse", "handlers", "finalbody"):
        for child in getattr(node, block, ()):
            yield from _statements(child)


def _proper(texts: list[str]) -> list[str]:
    return list(dict.fromkeys(text for text in texts if len(text) >= SHORTEST))
