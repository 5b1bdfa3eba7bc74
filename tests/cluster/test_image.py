"""The container image: what it is made from, by the text of its file."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from packaging.version import Version

from tests.cli.command import PROJECT
from tests.cluster.pins import CONTAINERFILE, IMAGE, RAY

INSTRUCTIONS = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", CONTAINERFILE, flags=re.M)).splitlines()


def arguments(instruction: str) -> list[list[str]]:
    """Words of each such instruction, without options."""
    found = [line.split()[1:] for line in INSTRUCTIONS if line.startswith(f"{instruction} ")]
    return [[word for word in words if not word.startswith("--")] for words in found]


def test_every_stage_has_the_same_pinned_base_and_ray_stays_at_its_version() -> None:
    assert len({words[0] for words in arguments("FROM")}) == 1
    pins = re.findall(r"ray\[default\]==([\d.]+)", CONTAINERFILE)
    assert [Version(pin) for pin in pins] == [RAY]


def test_the_comment_builds_what_the_manifests_name() -> None:
    assert set(re.findall(r"registry\.example\.com/\S+", CONTAINERFILE)) == {IMAGE}


def test_it_is_not_roots() -> None:
    assert arguments("USER")[-1] == ["ray"]


def test_only_what_is_named_gets_in() -> None:
    copied = [PurePosixPath(source) for words in arguments("COPY") for source in words[:-1]]
    own = {str(source) for source in copied if not source.is_absolute()}  # others come from the stage before
    assert own == {"pyproject.toml", "README.md", "LICENSE", "scaleot_ray", "jobs"}
    assert all((PROJECT / name).exists() for name in own)
    lines = (PROJECT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    assert {line[1:] for line in lines if line.startswith("!")} == own
    assert not arguments("ADD")


def test_no_secret_is_built_in() -> None:
    words = [word for name in ("ARG", "ENV") for line in arguments(name) for word in line]
    assert not [word for word in words if re.search("TOKEN|PASSWORD|SECRET|KEY", word)]
