"""Dependency runs one way: a folder imports only from those above it, and torch code imports no Ray."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "scaleot_ray"

ORDER = (
    *("errors", "plain_text", "result_folder", "processors", "progress", "interruption", "checkpoints", "ranks"),
    *("config", "families", "artifacts", "data", "evaluation", "emulator", "tuning", "plugin", "stages", "planner"),
    *("resources", "parallel"),
    *("federation/folder", "federation/rounds", "federation/roles", "federation/driver"),
    *("federation/preflight", "federation/environment", "federation/run"),
    "cli",
)
"""What lies above what, from the bottom of the house to its door."""

WITH_RAY = ("resources", "parallel", "federation/roles", "federation/driver", "cli")


def place(name: str) -> str | None:
    """Where a module is in ``ORDER``; None of the package itself."""
    parts = name.removeprefix("scaleot_ray").strip(".").split(".")
    return "/".join(parts[: 2 if parts[0] == "federation" else 1]) or None


def imported(code: str) -> Iterator[str]:
    """Modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def problems(module: str, code: str) -> list[str]:
    """What a module imports that it must not."""
    here, found = place(module), []
    for name in imported(code):
        there = place(name) if name.startswith("scaleot_ray") else None
        if there in ORDER and ORDER.index(there) > ORDER.index(here or ""):
            found.append(f"{module} imports {name}, which is further up")
        if name.split(".")[0] == "ray" and here not in WITH_RAY:
            found.append(f"{module} imports Ray")
    return found


def modules() -> list[str]:
    """All of the package but what only names others."""
    paths = [path.relative_to(PACKAGE.parent).with_suffix("") for path in sorted(PACKAGE.rglob("*.py"))]
    names = [".".join(path.parts).removesuffix(".__init__") for path in paths]
    return [name for name in names if name not in ("scaleot_ray", "scaleot_ray.__main__", "scaleot_ray.federation")]


def test_every_module_has_its_place() -> None:
    assert {place(name) for name in modules()} == set(ORDER)


def test_dependency_runs_one_way() -> None:
    found = []
    for name in modules():
        path = PACKAGE.parent / Path(*name.split("."))
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        found += problems(name, file.read_text(encoding="utf-8"))
    assert found == []


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("scaleot_ray.tuning.lora", "from scaleot_ray.stages.tune import tune_emulator"),
        ("scaleot_ray.federation.rounds.intake", "from scaleot_ray.federation.roles.coordinator import Coordinator"),
        ("scaleot_ray.federation.rounds.intake", "def late():\n    from scaleot_ray.federation import run\n"),
        ("scaleot_ray.emulator.build", "import ray.util"),
    ],
)
def test_what_runs_the_other_way_is_noticed(module: str, code: str) -> None:
    assert len(problems(module, code)) == 1
