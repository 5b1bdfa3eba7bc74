"""Documentation and examples say what is there: settings, JSON keys, files, links."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from scaleot_ray.artifacts.storage import read_artifact
from scaleot_ray.cli.demo import demo_defaults
from scaleot_ray.cli.main import build_app
from scaleot_ray.cli.settings import BuildSettings, EvaluateSettings, PlugSettings, TuneCommandSettings
from scaleot_ray.config import RunSettings, Settings, load_yaml, parse
from scaleot_ray.emulator.privacy import LEVELS, PrivacyResult, Rung
from tests.cli.command import PROJECT, Warm
from tests.cli.conftest import TUNE
from tests.cli.documented_keys import JsonPage, paths

EXAMPLES: dict[str, type[Settings]] = {
    "build.yaml": BuildSettings,
    "tune.yaml": TuneCommandSettings,
    "plug.yaml": PlugSettings,
    "evaluate.yaml": EvaluateSettings,
    "two_owners.yaml": RunSettings,
    "rounds.yaml": RunSettings,
    "cluster.yaml": RunSettings,
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
    others = r"^(?:ray|podman|kubectl|openssl|export|curl) (?:.*\\\n)*.*$|`(?:ray|kubectl|docker|prometheus) [^`]+`"
    options = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", re.sub(others, "", text, flags=re.M)))
    elsewhere = {
        "--help",
        "--working-dir",
        "--entrypoint-num-gpus",
        "--entrypoint-num-cpus",
        "--num-cpus",
        "--object-store-memory",
        "--labels",
        "--dashboard-agent-listen-port",
        "--metrics-export-port",
        "--constraint",
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


def undocumented(document: dict[str, Any]) -> set[str]:
    """Keys of a JSON result that docs/json.md does not have under its schema."""
    return JsonPage().undocumented(document)


def privacy_level(emulator: Path) -> dict[str, object]:
    """What a result says of an emulator that was built for a privacy level; one of random weights reaches none."""
    rung = Rung(alpha=0.25, beta=0.2, loss_margin=0.2, standard_error=0.02, verbatim_share=0.7)
    return PrivacyResult(read_artifact(emulator), "low", LEVELS["low"], (rung,)).as_json()


@pytest.fixture(scope="module")
def results(place: Path, warm: Warm) -> dict[str, list[dict[str, Any]]]:
    """Results of the commands that need no Ray, by schema: all that can be in them is in one of them."""
    build, tune = (json.loads((place / name).read_text()) for name in ("build.json", "tune.json"))
    found = [build, {**build, "privacy": privacy_level(place / "emulator")}, tune]
    choice = ["--task", "choice", "--column", "prompt=question"]
    validated = ["--set", "tune.evaluate_every=2"]
    for arguments in (
        ["inspect", "emulator"],
        ["inspect", "tuned/delta"],
        ["inspect", "tuned/metrics"],
        ["inspect", "tuned/audit.jsonl"],
        ["eval", "--model", "model", "--test", "test.jsonl", "--set", "block_size=32"],
        ["eval", "--model", "model", "--test", "choice.jsonl", *choice, "--set", "block_size=32"],
        ["tune", "--emulator", "emulator", "--train", "train.jsonl", "--output", "validated", *TUNE, *validated],
        ["plug", "--model", "model", "--emulator", "emulator", "--delta", "tuned/delta", "--output", "plugged"],
    ):
        found.append(warm.scaleot(*arguments, "--format", "json", cwd=place).json)
    by_schema: dict[str, list[dict[str, Any]]] = {}
    for document in found:
        assert "schema" in document, document
        by_schema.setdefault(document["schema"], []).append(document)
    return by_schema


@pytest.mark.parametrize("command", ["build", "tune", "inspect", "audit", "eval", "plug"])
def test_json_keys_are_those_of_the_page(results: dict[str, list[dict[str, Any]]], command: str) -> None:
    documents = results[f"scaleot.{command}/1"]
    assert {key for document in documents for key in undocumented(document)} == set()
    assert JsonPage().gone(*documents) == set()


def test_every_schema_has_a_section() -> None:
    source = "".join(path.read_text() for path in (PROJECT / "scaleot_ray").rglob("*.py"))
    assert JsonPage().schemas == set(re.findall(r"\"(scaleot\.\w+/\d+)\"", source))


def test_the_error_on_the_page_has_the_keys_of_errors(place: Path, warm: Warm) -> None:
    page = (PROJECT / "docs" / "json.md").read_text()
    (example,) = re.findall(r"```json\n(.*?)```", page, flags=re.S)
    error = warm.scaleot("inspect", "nowhere", "--format", "json", cwd=place).json
    assert set(paths(json.loads(example))) == set(paths(error))


def test_keys_in_the_wrong_section_and_keys_that_are_gone_are_noticed() -> None:
    page = JsonPage("""
## `a`: `scaleot.a/1`

The keys of a [shared](#shared-part), and:

| key | value |
|---|---|
| `schema` | `not_a_key` |
| `seconds.total`, `.load` | `not_a_key` |
| `rows[]` | each a [shared](#shared-part) and `not_a_key` |
| `files.*` | by name |

## Shared part

| key | value |
|---|---|
| `digest` | |

## `b`: `scaleot.b/1`

| `only_b` | |
""")
    shared = {"digest": "0"}
    whole = {
        "schema": "scaleot.a/1",
        "seconds": {"total": 1, "load": 1},
        "rows": [shared],
        "files": {"x.y": 1},
        **shared,
    }
    assert (page.undocumented(whole), page.gone(whole)) == (set(), set())
    wrong = {**whole, "only_b": 1, "not_a_key": 1, "load": 1, "rows": [{"digest": "0", "files": {}}]}
    assert page.undocumented(wrong) == {"only_b", "not_a_key", "load", "rows[].files"}
    less = {"schema": "scaleot.a/1", "seconds": {"total": 1}, "rows": [], **shared}
    assert page.gone(less) == {"seconds.load", "rows[].digest", "files", "files.*"}
    assert page.gone(less, whole) == set()
