"""The demo's text: real, large enough, the same every time, and no passage in two parts."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scaleot_ray.config import DataSettings
from scaleot_ray.data import demo_text as demo
from scaleot_ray.data import open_rows
from scaleot_ray.data.demo_text import DemoText, disjoint, write_demo_text
from scaleot_ray.data.installed_text import docstrings, language_reference, package_folder
from scaleot_ray.data.passages import passage_hashes
from scaleot_ray.errors import DataError, ResourcesMissing


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> DemoText:
    return write_demo_text(tmp_path_factory.mktemp("demo"))


def files(text: DemoText) -> dict[str, Path]:
    parts = {"public": text.public}
    for name, (train, test) in text.tenants.items():
        parts |= {f"{name} train": train, f"{name} test": test}
    return parts


def documents(path: Path) -> list[str]:
    return [row["text"] for row in open_rows(DataSettings(path=str(path)))]


def shared_passages(parts: dict[str, list[str]]) -> list[tuple[str, str, str]]:
    """Passages of 50 characters in two parts, found with nothing but Python's own strings and sets."""
    whole = {name: " ".join(" ".join(texts).split()) for name, texts in parts.items()}
    passages = {name: {text[at : at + 50] for at in range(len(text) - 49)} for name, text in whole.items()}
    return [
        (one, other, passage)
        for one, other in itertools.combinations(parts, 2)
        for passage in sorted(passages[one] & passages[other])
    ]


def test_no_passage_is_in_two_parts(text: DemoText) -> None:
    parts = {name: documents(path) for name, path in files(text).items()}
    assert len(parts) == 5
    assert shared_passages(parts) == []
    # The check can fail: a passage of exactly 50 characters, in other white space, is planted and found.
    source = "  ".join(" ".join(parts["library-docs test"]).split())
    passage = " ".join(source[4000:4200].split())[:50].replace(" ", "\n   ")
    parts["public"].insert(7, f"Before {passage} after")
    found = shared_passages(parts)
    assert {(one, other) for one, other, _ in found} == {("public", "library-docs test")}


def test_sizes(text: DemoText) -> None:
    sizes = {name: sum(map(len, documents(path))) for name, path in files(text).items()}
    assert sorted(text.tenants) == ["language-reference", "library-docs"]
    assert 150_000 <= sizes["public"] <= 2_000_000
    for name in text.tenants:
        assert 150_000 <= sizes[f"{name} train"] <= 600_000
        assert 40_000 <= sizes[f"{name} test"] <= 600_000


def test_documents_are_text(text: DemoText) -> None:
    for path in files(text).values():
        texts = documents(path)
        assert all(len(document) >= 200 and document == document.strip() for document in texts)
        assert len(set(texts)) == len(texts)
        letters = sum(character.isalpha() or character.isspace() for document in texts for character in document)
        assert letters > 0.7 * sum(map(len, texts))
    assert any("Python" in document for document in documents(text.tenants["language-reference"][0]))
    assert any("ndarray" in document for document in documents(text.tenants["library-docs"][1]))


def test_the_same_again_in_another_process(text: DemoText, tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from scaleot_ray.data.demo_text import write_demo_text"
    code += "; loaded = lambda: {name.partition('.')[0] for name in sys.modules}"
    code += "; before = loaded(); write_demo_text(Path(sys.argv[1])); print(*loaded() - before)"
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(tmp_path)],
        env={**os.environ, "PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        check=True,
    )
    for path in files(text).values():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    assert set(process.stdout.split()) <= {"pydoc_data"}, "packages are read, not imported"
    assert process.stderr == ""


def test_another_seed_deals_other_documents(text: DemoText) -> None:
    other = demo.demo_parts(seed=1)
    assert shared_passages(other) == []
    assert other["library-docs-test"] != documents(text.tenants["library-docs"][1])


# ---- disjoint


def words(seed: int, count: int) -> str:
    drawn = random.Random(seed)
    return " ".join("".join(drawn.choices("abcdefghij", k=drawn.randint(2, 9))) for _ in range(count))


def test_only_the_shared_paragraph_goes() -> None:
    kept, shared, last = words(1, 80), words(2, 30), words(3, 80)
    parts = {"test": [words(4, 40) + "\n\n" + shared], "train": [f"{kept}\n\nso {shared} it is\n\n{last}"]}
    assert disjoint(parts)["test"] == parts["test"], "the earlier part keeps everything"
    assert disjoint(parts)["train"] == [f"{kept}\n\n{last}"]


def test_a_passage_over_the_ends_of_paragraphs_and_documents_counts() -> None:
    seam = words(5, 6), words(6, 6), words(7, 6)
    parts = {
        "test": [words(1, 60) + " " + " ".join(seam)],
        "train": [words(2, 60) + "\n\n" + seam[0], seam[1] + "\n\n" + seam[2] + "\n\n" + words(3, 60)],
    }
    assert shared_passages(parts)
    assert all(len(paragraph) < 50 for paragraph in seam)
    assert shared_passages(disjoint(parts)) == []


@pytest.mark.parametrize("seed", range(5))
def test_disjoint_on_texts_full_of_repetition(seed: int) -> None:
    drawn = random.Random(seed)
    phrases = [words(number, 8) for number in range(40)]
    parts = {
        name: [
            "\n\n".join(" ".join(drawn.choices(phrases, k=2)) + words(drawn.random().__hash__(), 20) for _ in range(4))
            for _ in range(10)
        ]
        for name in ("one", "two", "three")
    }
    assert shared_passages(parts)
    result = disjoint(parts)
    assert shared_passages(result) == []
    assert result["one"] == parts["one"]


def test_passage_hashes_are_a_function_of_the_passage() -> None:
    text = words(1, 300) + " é漢😀 " + words(2, 300)
    text += text[100:400]
    hashes = passage_hashes(text)
    assert len(hashes) == len(text) - 49
    by_hash: dict[int, str] = {}
    for at, value in enumerate(hashes.tolist()):
        assert by_hash.setdefault(value, text[at : at + 50]) == text[at : at + 50]
    assert len(by_hash) == len({text[at : at + 50] for at in range(len(hashes))})
    assert passage_hashes("x" * 49).dtype == np.uint64
    assert len(passage_hashes("x" * 49)) == 0


# ---- sources


def test_docstrings_are_parsed_not_run(tmp_path: Path) -> None:
    long = "Says what it does. " * 20
    (tmp_path / "module.py").write_text(
        f'"""{long}module"""\nraise SystemExit("imported")\nif True:\n    class A:\n        def method(self):\n'
        f'            """First line.\n\n            {long}method\n            """\n'
        '    def short():\n        """Brief."""\n'
    )
    (tmp_path / "template.py").write_text('"""' + long + '"""\ndef {{ name }}(:\n')
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text(f'"""{long}"""\n')
    (tmp_path / "again.py").write_text(f'"""{long}module"""\n')
    found = docstrings(tmp_path, 100_000, seed=0)
    assert sorted(found) == sorted([f"{long}module", f"First line.\n\n{long}method"])


def test_the_reference_comes_in_sections_once_each() -> None:
    sections = language_reference()
    assert len(sections) > 100
    assert len(set(sections)) == len(sections)


def test_a_python_without_enough_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "language_reference", list)
    monkeypatch.setattr(demo, "docstrings", lambda *_: [])
    with pytest.raises(DataError, match="0 characters for language-reference-test, expected at least 40000"):
        write_demo_text(tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


def test_a_package_that_is_not_there() -> None:
    assert package_folder("no_such_package_anywhere") is None
    found = package_folder("numpy")
    assert found is not None
    assert (found / "__init__.py").is_file()


# ---- writing


def failing(code: int) -> Callable[..., Any]:
    def replace(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    return replace


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {name: ["x" * 200] for name in ("public", *(f"{t}-{p}" for t in demo.TRAIN for p in ("train", "test")))}
    monkeypatch.setattr(demo, "demo_parts", lambda seed: parts)
    written = write_demo_text(tmp_path / "demo")
    assert [json.loads(line) for line in written.public.read_text().splitlines()] == [{"text": "x" * 200}]
    parts["public"] = ["y" * 200]
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", failing(errno.ENOSPC))
        with pytest.raises(ResourcesMissing, match="the disk is full"):
            write_demo_text(tmp_path / "demo")
    assert "x" * 200 in written.public.read_text()
    assert len(list((tmp_path / "demo").iterdir())) == 5, "no temporary file stays"


def test_a_place_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "demo_parts", lambda seed: {"public": ["x"]})
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot be written"):
        write_demo_text(tmp_path / "file")
