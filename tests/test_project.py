"""What pyproject.toml promises is what the tools check: the oldest Python, and the range of torch."""

from __future__ import annotations

import re
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from scaleot_ray.cli.checks import python_version

PROJECT = Path(__file__).parents[1]
PYPROJECT = (PROJECT / "pyproject.toml").read_text()


def _value(pattern: str) -> str:
    (found,) = re.findall(pattern, PYPROJECT, flags=re.M)
    return str(found)


def test_types_and_style_are_checked_for_the_oldest_python() -> None:
    oldest = _value(r'^requires-python = ">=([\d.]+)"')
    assert _value(r'^python_version = "([\d.]+)"') == oldest
    assert _value(r'^target-version = "(\w+)"') == "py" + oldest.replace(".", "")
    major, minor = map(int, oldest.split("."))
    assert python_version((major, minor, 0)).status == "ok"
    assert python_version((major, minor - 1, 20)).status == "fail"


def test_the_torch_for_cpus_is_one_the_package_takes() -> None:
    lines = (PROJECT / "constraints-cpu.txt").read_text().splitlines()
    (pin,) = (Requirement(line) for line in lines if not line.startswith("#"))
    (asked,) = (Requirement(text) for text in re.findall(r'"(torch[>=<][^"]*)"', PYPROJECT))
    (version,) = (specifier.version for specifier in pin.specifier)
    assert str(pin) == f"torch=={version}"
    assert Version(version) in asked.specifier
