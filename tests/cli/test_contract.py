"""What holds for every command: help, exit codes, one JSON object, no stack trace."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import ValidationError

from scaleot_ray.cli.build import build_emulator
from scaleot_ray.cli.main import build_app
from scaleot_ray.cli.output import Output
from scaleot_ray.cli.settings import BuildSettings, EvaluateSettings, PlanSettings, PlugSettings, TuneCommandSettings
from scaleot_ray.config import DataSettings, ModelSettings, RunSettings, Settings, override
from scaleot_ray.errors import ConfigError
from tests.cli.command import python, scaleot

COMMANDS = ("demo", "doctor", "build", "tune", "plug", "eval", "run", "status", "tenants", "revoke", "inspect")
HEAVY = ("torch", "transformers", "datasets", "ray", "peft", "pyarrow", "numpy")


def test_help_is_quick_and_names_every_command() -> None:
    start = time.monotonic()
    done = scaleot("--help")
    seconds = time.monotonic() - start
    assert done.code == 0
    assert done.err == ""
    for command in COMMANDS:
        assert command in done.out
    assert seconds < 3  # 0.5 s on an idle machine; the libraries alone would take more than this


def test_no_heavy_library_is_loaded_for_help() -> None:
    code = f"import sys, scaleot_ray.cli.main as m; m.build_app(); print([n for n in {HEAVY} if n in sys.modules])"
    assert python("-c", code).out.strip() == "[]"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(command: str) -> None:
    done = scaleot(command, "--help")
    assert done.code == 0
    assert f"scaleot {command}" in done.out.split("Example", 1)[1]
    assert "Reads" in done.out
    assert "rites" in done.out
    assert "--format" in done.out


def test_help_fits_eighty_columns() -> None:
    for command in build_app().registered_commands:
        assert command.callback is not None
        for line in (command.callback.__doc__ or "").splitlines():
            assert len(line.removeprefix("    ")) <= 78, line


SETTINGS: dict[str, type[Settings]] = {
    "demo": RunSettings,
    "run": RunSettings,
    "doctor": PlanSettings,
    "build": BuildSettings,
    "tune": TuneCommandSettings,
    "plug": PlugSettings,
    "eval": EvaluateSettings,
}


def unknown_keys(section: type[Settings], assignment: str) -> list[str]:
    try:
        section.model_validate(override({}, [assignment]))
    except ValidationError as error:
        return [str(item["loc"]) for item in error.errors() if item["type"] != "missing"]
    return []


def test_the_example_of_set_is_a_setting_of_the_command() -> None:
    command: Any = typer.main.get_command(build_app())
    found = {
        name: option.help for name, sub in command.commands.items() for option in sub.params if "--set" in option.opts
    }
    assert found.keys() == SETTINGS.keys()
    for name, section in SETTINGS.items():
        (example,) = re.findall(r"e\.g\. ([^;]+);", found[name])
        assert unknown_keys(section, example) == [], name
    assert unknown_keys(BuildSettings, "tune.learning_rate=5e-5") == ["('tune',)"]


def test_nothing_given_is_help() -> None:
    done = scaleot()
    assert done.code == 0
    assert "Usage: scaleot" in done.out


def test_version() -> None:
    assert scaleot("--version").out.startswith("scaleot 0.")


@pytest.mark.parametrize(
    ("arguments", "message", "remedy"),
    [
        (["bild"], "No such command 'bild'. Did you mean 'build'?", "`scaleot --help`"),
        (["build", "--model", "m"], "Missing option '--public'", "`scaleot build --help`"),
        (["run"], "Missing argument", "`scaleot run --help`"),
        (["inspect", "--depth", "3"], "No such option: --depth", "`scaleot inspect --help`"),
        (["inspect", "x", "--format", "yaml"], "'yaml'", "`scaleot inspect --help`"),
        (
            ["build", "--model", "m", "--public", "p", "--output", "o", "--alpha", "x"],
            "'--alpha'",
            "`scaleot build --help`",
        ),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, remedy: str) -> None:
    done = scaleot(*arguments)
    assert done.code == 2
    assert done.out == ""
    assert message in done.err
    assert done.err.startswith("error: ")
    assert f"\n  → {remedy}" in done.err


@pytest.mark.parametrize("arguments", [["bild"], ["run"], ["run", "--bogus"], ["run", "none.yaml"]])
@pytest.mark.parametrize("form", [["--format", "json"], ["--format=json"]])
def test_errors_as_json(arguments: list[str], form: list[str], tmp_path: Path) -> None:
    done = scaleot(*arguments, *form, cwd=tmp_path)
    assert done.code == 2
    assert done.error["type"] == "ConfigError"
    assert done.error["message"] in done.err


class TestWrongInputs:
    """Each is refused before anything heavy is done, by the name of the option, key or file."""

    def refused(self, tmp_path: Path, *arguments: object, code: int = 2) -> dict[str, str]:
        done = scaleot(*arguments, "--format", "json", cwd=tmp_path)
        assert done.code == code, done.err
        assert done.error["remedy"]
        assert f"error: {done.error['message']}" in done.err
        return done.error

    def test_alpha_out_of_range(self, tmp_path: Path) -> None:
        error = self.refused(tmp_path, "build", "--model=m", "--public=p", "--output=o", "--alpha=2")
        assert error["message"].startswith("scaleot build: emulator.alpha: ")
        assert "less than or equal to 1" in error["message"]
        assert "found 2" in error["message"]

    def test_an_empty_output(self, tmp_path: Path) -> None:
        error = self.refused(tmp_path, "build", "--model=m", "--public=p", "--output=")
        assert error["message"].startswith("scaleot build: output: ")

    @pytest.mark.parametrize("output", [".", "..", "a/..", "/"])
    def test_output_without_a_name(self, tmp_path: Path, output: str) -> None:
        settings = BuildSettings(
            model=ModelSettings(path="m"), public=DataSettings(path="p"), output=output, overwrite=True
        )
        with pytest.raises(ConfigError, match=r"^output: ") as caught:
            build_emulator(settings, Output())
        assert "path of a new folder" in caught.value.remedy

    def test_unknown_key(self, tmp_path: Path) -> None:
        error = self.refused(
            tmp_path, "tune", "--emulator=e", "--train=t", "--output=o", "--set", "tune.learning_rte=1"
        )
        assert error["message"] == "scaleot tune: unknown key 'tune.learning_rte'."
        assert error["remedy"] == "Did you mean 'learning_rate'?"

    def test_unknown_key_in_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "run.yaml").write_text("model: {path: m}\npublik: {path: p}\n")
        error = self.refused(tmp_path, "run", "run.yaml")
        assert error["message"] == "run.yaml: unknown key 'publik'."
        assert "'public'" in error["remedy"]

    def test_set_without_a_value(self, tmp_path: Path) -> None:
        error = self.refused(tmp_path, "eval", "--test=t", "--model=m", "--set", "tune.steps")
        assert "expected key=value" in error["message"]

    @pytest.mark.parametrize(
        ("column", "hint"),
        [("promt=q", "Did you mean 'prompt'?"), ("prompt", "--column prompt=question"), ("zz=q", "Known names: text")],
    )
    def test_column(self, tmp_path: Path, column: str, hint: str) -> None:
        error = self.refused(tmp_path, "eval", "--test=t", "--model=m", "--column", column)
        assert column in error["message"]
        assert hint in error["remedy"]

    def test_nothing_to_measure(self, tmp_path: Path) -> None:
        assert "nothing to measure" in self.refused(tmp_path, "eval", "--test=t")["message"]

    @pytest.mark.parametrize(
        ("row", "missing"), [("plug_in", "--emulator --delta"), ("full_tuned", "--emulator --train")]
    )
    def test_a_row_without_its_inputs(self, tmp_path: Path, row: str, missing: str) -> None:
        error = self.refused(tmp_path, "eval", "--test=t", "--model=m", f"--rows=full_zero_shot,{row}")
        assert error["message"] == f"rows: {row} needs {missing}."

    def test_an_unknown_row(self, tmp_path: Path) -> None:
        error = self.refused(tmp_path, "eval", "--test=t", "--model=m", "--rows=full_zeroshot")
        assert error["message"].startswith("scaleot eval: rows.0: ")

    def test_missing_artefact(self, tmp_path: Path) -> None:
        error = self.refused(tmp_path, "inspect", "nowhere", code=3)
        assert error["type"] == "ArtifactRefused"
        assert "nowhere" in error["message"]

    def test_demo_without_its_model(self, tmp_path: Path) -> None:
        error = self.refused(tmp_path, "demo")
        assert "SmolLM2-135M" in error["message"]
        assert "make demo" in error["remedy"]
        assert list(tmp_path.iterdir()) == []
