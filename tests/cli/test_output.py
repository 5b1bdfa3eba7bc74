"""Stdout carries the result and nothing else; progress is bars on a terminal and lines elsewhere."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
from pathlib import Path
from typing import Any

import pytest

from scaleot_ray.cli.bars import ProgressBars, clock, figures, time_left
from scaleot_ray.cli.output import console, finite
from scaleot_ray.cli.tables import bytes_text, gain_text, show_standard_table
from scaleot_ray.progress import Progress
from tests.cli.command import python

NOISY = """
import os, subprocess, sys, typer
from scaleot_ray.cli.main import execute
from scaleot_ray.cli.options import DebugOption, Format, FormatOption
from scaleot_ray.cli.output import working

app = typer.Typer()

@app.command()
def noisy(context: typer.Context, format: FormatOption = Format.text, debug: DebugOption = False, fail: bool = False):
    with working(context, "Again.") as out:
        print("from Python")
        os.write(1, b"from C\\n")
        subprocess.run(["echo", "from a child"])
        if fail:
            raise ZeroDivisionError("half way")
        out.result({"a": float("nan"), "b": [1.5, float("inf")]}, lambda console: console.print("a table"))
        print("afterwards")

code = execute(app, sys.argv[1:], "noisy")
print("at the very end")
sys.exit(code)
"""


class TestStdout:
    def test_json_is_alone_whatever_prints(self) -> None:
        done = python("-c", NOISY, "--format", "json")
        assert done.code == 0
        assert done.json == {"a": None, "b": [1.5, None]}
        for noise in ("from Python", "from C", "from a child", "afterwards", "at the very end"):
            assert noise in done.err

    def test_a_table_is_alone_too(self) -> None:
        assert python("-c", NOISY).out == "a table\n"

    def test_an_unexpected_error_is_one_json_object(self, tmp_path: Path) -> None:
        done = python("-c", NOISY, "--fail", "--format", "json", TMPDIR=str(tmp_path))
        assert done.code == 5
        assert done.error["type"] == "ZeroDivisionError"
        (trace,) = tmp_path.iterdir()
        assert str(trace) in done.error["remedy"]

    def test_debug_shows_the_trace(self, tmp_path: Path) -> None:
        with pytest.raises(AssertionError, match="ZeroDivisionError: half way"):
            python("-c", NOISY, "--fail", "--debug", TMPDIR=str(tmp_path))

    def test_a_reader_that_goes_away_is_no_error(self) -> None:
        code = NOISY.replace('console.print("a table")', 'console.print("line\\n" * 100000)')
        shell = 'import subprocess,sys; p=subprocess.Popen([sys.executable,"-c",sys.argv[1]],stdout=-1,stderr=-1);'
        shell += "p.stdout.readline(); p.stdout.close(); err=p.stderr.read().decode(); print(p.wait(), 'error' in err)"
        assert python("-c", shell, code).out.strip() == "0 False"


def test_numbers_that_json_lacks_become_null() -> None:
    assert finite({"x": (1, float("-inf")), 2: {"y": float("nan")}}) == {"x": [1, None], "2": {"y": None}}
    json.dumps(finite({"x": float("nan")}), allow_nan=False)


def _all_of(terminal: int) -> str:
    """Everything written to a terminal whose other side is closed; it comes in several pieces."""
    pieces = []
    with os.fdopen(terminal, "rb", buffering=0) as stream, contextlib.suppress(OSError):  # EIO: nothing is left
        while piece := stream.read(65536):
            pieces.append(piece)
    return b"".join(pieces).decode()


class TestProgress:
    def test_lines_now_and_then_without_a_terminal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now = [0.0]
        monkeypatch.setattr("scaleot_ray.cli.bars.time.monotonic", lambda: now[0])
        stream = io.StringIO()
        with ProgressBars(stream) as bars:
            for step in range(1, 101):
                now[0] += 1.0
                for tenant in ("tune alice", "tune bob"):
                    bars(Progress(tenant, step, 100, 2.5, 130.0, 100.0 - step))
        lines = [line for line in stream.getvalue().splitlines() if line.startswith("tune alice")]
        assert lines[0] == "tune alice: 1/100  loss 2.500  130 tokens/s  1:39 left"
        assert lines[-1] == "tune alice: 100/100  loss 2.500  130 tokens/s"
        assert len(lines) == 8  # the first, one in 15 seconds, the last
        assert "tune bob: 100/100" in stream.getvalue()

    def test_bars_of_several_tenants_on_a_terminal(self) -> None:
        main, side = pty.openpty()
        with os.fdopen(side, "w") as stream, ProgressBars(stream) as bars:
            bars(Progress("tune alice", 3, 10, 2.5))
            bars(Progress("tune bob", 4, 10))
            bars(Progress("tune [/x]", 4, 10))
            bars(Progress("tune alice", 10, 10, 2.25))
        text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", _all_of(main))
        assert "10/10 loss 2.250" in text
        assert "tune bob" in text
        assert "tune [/x]" in text

    def test_figures_are_those_there_are(self) -> None:
        assert figures(Progress("s", 1, 2)) == ""
        assert figures(Progress("s", 1, 2, tokens_per_second=12345.6)) == "12,346 tokens/s"
        assert time_left(Progress("s", 2, 2, seconds_left=9.0)) == ""
        assert (clock(5), clock(65), clock(3661)) == ("0:05", "1:05", "1:01:01")


TENANT: dict[str, Any] = {
    "name": "alice",
    "metric": "loss",
    "full_zero_shot": 3.09,
    "emulator_zero_shot": 4.22,
    "emulator_tuned": 3.37,
    "plug_in": 2.87,
    "full_tuned": 2.56,
    "delta": -0.5,
    "delta_interval": [-0.55, -0.45],
    "gain": {"value": 0.41, "low": 0.35, "high": 0.47, "usable": True, "reason": None},
}


def shown(*tenants: dict[str, Any]) -> str:
    stream = io.StringIO()
    show_standard_table(console(stream), tenants)
    return stream.getvalue()


class TestTable:
    def test_five_rows_and_two_figures(self) -> None:
        text = shown(TENANT, {**TENANT, "name": "bob", "metric": "accuracy", "full_tuned": 0.5})
        for words in (
            "full zero-shot",
            "emulator tuned",
            "plug-in",
            "2.870",
            "-0.500 (-0.550 to -0.450)",
            "0.41 (0.35 to 0.47)",
        ):
            assert words in text
        assert "loss, nats/token ↓" in text
        assert "accuracy ↑" in text

    def test_a_loss_has_its_perplexity_beside(self) -> None:
        rows = {"full_zero_shot": 21.98, "emulator_zero_shot": None, "emulator_tuned": 1234.5, "plug_in": 2.5e7}
        choice = {**TENANT, "name": "bob", "metric": "accuracy"}
        text = shown({**TENANT, "perplexity": {**rows, "full_tuned": 1.234}}, choice)
        assert text.count("(perplexity)") == 1
        lines = {line.split("  ")[0].strip(): line.split() for line in text.splitlines() if line.strip()}
        assert lines["full zero-shot"][-3:] == ["3.090", "(22.0)", "3.090"]
        assert lines["emulator zero-shot"][-2:] == ["4.220", "4.220"]
        assert lines["emulator tuned"][-2] == "(1234)"
        assert lines["plug-in"][-2] == "(2.5e+07)"
        assert lines["full tuned"][-2] == "(1.23)"

    def test_two_tenants_fit_a_terminal_of_80_columns(self) -> None:
        losses = dict.fromkeys(("full_zero_shot", "emulator_zero_shot", "emulator_tuned", "plug_in", "full_tuned"), 9.9)
        text = shown(*({**TENANT, "name": name, "perplexity": losses} for name in ("language-reference", "bob")))
        assert max(map(len, text.splitlines())) <= 80
        assert text.count("-0.500 (-0.550 to -0.450)") == 2

    def test_rows_that_nobody_has_are_left_out(self) -> None:
        text = shown({**TENANT, "full_tuned": None, "gain": None})
        assert "full tuned" not in text
        assert "recovered gain" not in text

    def test_multiple_choice_shows_its_further_measures(self) -> None:
        choice = {**TENANT, "metric": "accuracy", "log_likelihood": {**TENANT, "plug_in": -1.25}}
        text = shown(choice)
        assert "log-likelihood of right answer, nats ↑" in text
        assert "-1.250" in text

    def test_a_gain_that_cannot_be_said_says_why(self) -> None:
        gain = {"value": None, "low": None, "high": None, "usable": False, "reason": "full tuning gains too little"}
        assert gain_text(gain) == "–"
        assert "G of alice: full tuning gains too little" in shown({**TENANT, "gain": gain})

    def test_bytes(self) -> None:
        assert [bytes_text(n) for n in (0, 999, 1000, 41_700_000, 2.5e12)] == [
            "0 B",
            "999 B",
            "1.0 kB",
            "41.7 MB",
            "2.5 TB",
        ]
