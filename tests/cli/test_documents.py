"""Documentation and examples say what is there: settings, JSON keys, files, links."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scaleot_ray.cli.demo import demo_defaults
from scaleot_ray.cli.main import build_app
from scaleot_ray.cli.settings import BuildSettings, EvaluateSettings, PlugSettings, TuneCommandSettings
from scaleot_ray.config import RunSettings, Settings, load_yaml, parse
from tests.cli.command import PROJECT, Warm

EXAMPLES: dict[str, type[Settings]] = {
    "build.yaml": BuildSettings,
    "tune.yaml": TuneCommandSettings,
    "plug.yaml": PlugSettings,
    "evaluate.yaml": EvaluateSettings,
    "two_owners.yaml": RunSettings,
    "multiple_choice.yaml": RunSettings,
}
PAGES = [PROJECT / "README.md", PROJECT / "CHANGELOG.md", *sorted((PROJECT / "docs").glob("*.md"))]


def test_every_example_is_known_here() -> None:
    assert {path.name for path in (PROJECT / "examples").iterdir()} == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_load_and_start_with_their_commands(name: str) -> None:
    path = PROJECT / "examples" / name
    load_yaml(EXAMPLES[name], path)
    comment = re.match(r"(#.*\n)+", path.read_text())
    assert comment is not None
    assert f"examples/{name}" in comment.group()
    for job in re.findall(r"jobs/\w+\.py", comment.group()):
        assert (PROJECT / job).exists()


def test_the_demo_settings_make_a_run() -> None:
    data = {"path": "x.jsonl"}
    tenants = [{"name": "a", "train": data, "test": data}]
    settings = parse(RunSettings, {**demo_defaults(), "model": {"path": "m"}, "public": data, "tenants": tenants})
    assert settings.evaluator
    assert settings.emulator.alpha >= 0.25


def test_configuration_page_is_what_the_classes_say() -> None:
    page = runpy.run_path(str(PROJECT / "docs" / "write_configuration.py"))["page"]
    assert (PROJECT / "docs" / "configuration.md").read_text() == page(), "run python docs/write_configuration.py"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text()
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        linked = (path.parent / name).resolve() if name else path
        assert linked.exists(), target
        if anchor:
            headings = [re.sub(r"[^\w\- ]", "", line.lstrip("# ")).lower() for line in linked.read_text().splitlines()]
            assert anchor in [heading.replace(" ", "-") for heading in headings], target


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_commands_in_the_text_exist(path: Path) -> None:
    app = build_app()
    known = {command.name for command in app.registered_commands}
    text = path.read_text()
    assert set(re.findall(r"`?scaleot ([a-z]+)", text)) <= known
    options = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", re.sub(r"\n```sh\nray .*?```", "", text, flags=re.S)))
    elsewhere = {
        "--help",
        "--working-dir",
        "--entrypoint-num-gpus",
        "--entrypoint-num-cpus",
        "--shm-size",
        "--dashboard-agent-listen-port",
    }
    assert options - elsewhere <= declared_options() | {"--version"}


def declared_options() -> set[str]:
    import typer

    command: Any = typer.main.get_command(build_app())
    return {name for sub in command.commands.values() for option in sub.params for name in option.opts}


def test_troubleshooting_quotes_what_the_program_says() -> None:
    source = "".join(path.read_text() for path in (PROJECT / "scaleot_ray").rglob("*.py"))
    headings = re.findall(r"^### (.*)$", (PROJECT / "docs" / "troubleshooting.md").read_text(), flags=re.M)
    assert len(headings) > 20
    for quoted in re.findall(r"`([^`]+)`", "\n".join(headings)):
        assert quoted in source, quoted


def keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from keys(item)
    elif isinstance(value, list):
        for item in value:
            yield from keys(item)


def undocumented(document: dict[str, Any]) -> set[str]:
    """Keys of a JSON result that docs/json.md does not mention; names that users gave do not count."""
    words = set(re.findall(r"`(\w+)`", (PROJECT / "docs" / "json.md").read_text()))
    given = {"tokenizer", "tokenizer_config", "README"}
    return {key for key in keys(document) if key.split(".")[0] not in words | given}


def test_json_keys_are_documented(place: Path, warm: Warm) -> None:
    documents = [json.loads((place / name).read_text()) for name in ("build.json", "tune.json")]
    for arguments in (
        ["inspect", "emulator"],
        ["inspect", "tuned/metrics"],
        ["eval", "--model", "model", "--test", "choice.jsonl", "--task", "choice", "--column", "prompt=question"],
    ):
        more = ["--set", "block_size=32"] if arguments[0] == "eval" else []
        documents.append(warm.scaleot(*arguments, *more, "--format", "json", cwd=place).json)
    for document in documents:
        assert undocumented(document) == set(), document["schema"]
    assert undocumented({"new_key": 1}) == {"new_key"}
