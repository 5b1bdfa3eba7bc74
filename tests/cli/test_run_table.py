"""The table of a run: who is shown, what of it, and that it fits the terminal; lines where there is none."""

from __future__ import annotations

import io
import os
import pty
import re
from collections.abc import Sequence

import pytest
from rich.console import Console

from scaleot_ray.cli.run_table import RunTable
from scaleot_ray.progress import Progress, TenantState
from tests.cli.test_output import _all_of

MANY = [f"tenant-{number:02d}" for number in range(40)]


def shown(table: RunTable, width: int = 80, height: int = 24) -> list[str]:
    """The lines of a table on a terminal of this size."""
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=width, height=height)
    console.print(table)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) < height
    assert max(map(len, lines)) <= width
    return [line.rstrip() for line in lines]


def begun(names: Sequence[str], rounds: int = 1) -> RunTable:
    """A table of data owners that wait for their turn in round 1."""
    table = RunTable(names, rounds, io.StringIO())
    for name in names:
        table.change(TenantState(name, "waiting", 1))
    return table


def tuning(table: RunTable, name: str, number: int = 1) -> None:
    table.change(TenantState(name, "tuning", number))


def row_of(table: RunTable, name: str) -> str:
    """Its row, with single spaces and without the bar."""
    (line,) = (line for line in shown(table, 120) if line.startswith(f"{name} "))
    return " ".join(re.sub("[━╸╺]", " ", line).split())


def test_forty_data_owners_fit_in_24_lines() -> None:
    table = begun(MANY)
    table(Progress("measure fit", 9, 9, 3.0))
    for name in MANY[:30]:
        tuning(table, name)
        table(Progress(f"tune {name}", 5, 20, 2.5, 12345.6, 3661.0, name, 1))
    table.change(TenantState(MANY[3], "left out", 1, f"data owner {MANY[3]} died: its process [was killed].\n | more"))
    table.change(TenantState(MANY[7], "submitted", 1))
    lines = shown(table)
    assert len(lines) == 23
    assert lines[0].startswith("measure fit")
    assert lines[2].split()[:2] == [MANY[0], "tune"]
    assert lines[2].endswith("2.500   12,346 1:01:01")
    (failed,) = (line for line in lines if line.startswith(MANY[3]))
    assert failed.startswith(f"{MANY[3]}  left out: data owner {MANY[3]} died: its process [was killed]")
    assert lines.index(failed) == 21  # after those at work, of whom it has taken one's place
    assert not [line for line in lines if line.startswith(MANY[7])]
    assert lines[-1] == "28 at work, 10 waiting, 1 submitted, 1 left out"


def test_those_left_out_have_a_share_and_no_more() -> None:
    table = begun(MANY)
    for name in MANY[:20]:
        tuning(table, name)
    for name in MANY[20:]:
        table.change(TenantState(name, "left out", 1, "too late"))
    lines = shown(table)
    assert [line for line in lines if "starts tuning" in line] == lines[1:17]
    assert [line for line in lines if line.endswith("left out: too late")] == lines[17:22]
    assert lines[22] == "20 at work, 20 left out"


@pytest.mark.parametrize(("width", "height"), [(80, 3), (60, 6), (40, 24), (200, 60)])
def test_any_terminal_is_wide_and_high_enough(width: int, height: int) -> None:
    table = begun(MANY, rounds=3)
    for number in range(5):
        table(Progress(f"stage {number}", 1, 9))
    for name in MANY[:10]:
        tuning(table, name)
        table(Progress(f"tune {name}", 5, 20, 2.5, 12345.6, 3661.0, name, 1))
    for name in MANY[10:20]:
        table.change(TenantState(name, "left out", 1, "too late" * 40))
    assert shown(table, width, height)[-1].startswith("round 1: 10 at work, 20 waiting")


def test_a_row_shows_what_is_done_now() -> None:
    table = begun(["alice", "tune"])
    assert row_of(table, "alice") == "alice waiting"
    tuning(table, "alice")
    assert row_of(table, "alice") == "alice starts tuning"
    table(Progress("data owner alice waits for 2 processors", 0, 1, tenant="alice"))
    assert row_of(table, "alice") == "alice data owner waits for 2 processors"
    table(Progress("data owner alice waits for 2 processors", 1, 1, tenant="alice"))
    assert row_of(table, "alice") == "alice starts tuning"
    table(Progress("tune alice", 20, 20, 2.5, 130.0, 0.0, "alice", 1))
    table(Progress("emulator tuned alice", 1, 24, 2.25, None, 5.0, "alice", 1))
    assert row_of(table, "alice") == "alice emulator tuned 2.250 0:05"
    tuning(table, "tune")
    table(Progress("tune tune", 1, 24, tenant="tune", round=1))
    assert row_of(table, "tune") == "tune tune"


def test_a_late_report_changes_nothing() -> None:
    table = begun(["alice"], rounds=2)
    tuning(table, "alice")
    table(Progress("tune alice", 19, 20, 2.5, tenant="alice", round=1))
    table.change(TenantState("alice", "submitted", 1))
    table(Progress("emulator tuned alice", 24, 24, 2.25, tenant="alice", round=1))
    assert row_of(table, "alice") == "alice 1 submitted 2.250"
    assert shown(table)[-1] == "round 1: 1 submitted"
    tuning(table, "alice", 2)
    table(Progress("emulator tuned alice", 24, 24, 9.0, tenant="alice", round=1))
    assert row_of(table, "alice") == "alice 2 starts tuning 2.250"


def test_tuning_is_shown_before_the_evaluator_beside_it() -> None:
    table = begun(["alice"])
    tuning(table, "alice")
    table.change(TenantState("alice", "measuring"))
    table(Progress("tune alice", 1, 20, 2.5, tenant="alice", round=1))
    table(Progress("tune full alice", 1, 20, 3.5, tenant="alice"))
    assert row_of(table, "alice") == "alice tune 2.500"
    table.change(TenantState("alice", "submitted", 1))
    assert row_of(table, "alice") == "alice tune full 3.500"
    table.change(TenantState("alice", "measured"))
    assert row_of(table, "alice") == "alice measured 2.500"
    assert shown(table)[-1] == "1 measured"


def test_rows_of_the_full_model_measured_early_leave_a_data_owner_waiting() -> None:
    table = begun(["alice"])
    table.change(TenantState("alice", "measuring"))
    assert row_of(table, "alice") == "alice starts measuring"
    assert shown(table)[-1] == "1 at work"
    table.change(TenantState("alice", "measured"))
    assert shown(table)[-1] == "1 waiting"
    table.change(TenantState("alice", "submitted", 1))
    assert shown(table)[-1] == "1 submitted"


def test_an_evaluator_works_on_for_one_that_is_left_out() -> None:
    table = begun(["alice"])
    table.change(TenantState("alice", "left out", 1, "alice took too long."))
    table.change(TenantState("alice", "measuring"))
    table(Progress("full tuned alice", 1, 20, 3.5, tenant="alice"))
    lines = shown(table)
    assert [line.split()[:3] for line in lines[1:3]] == [["alice", "full", "tuned"], ["alice", "left", "out:"]]
    assert lines[2].endswith("left out: took too long.")
    assert lines[3] == "1 left out"


def test_own_stages_collapse_to_those_that_run() -> None:
    table = RunTable(["alice"], 1, io.StringIO())
    assert shown(table)[0].startswith("loading")
    for stage, step in (("calibrate", 9), ("layer damage", 9), ("stage 1", 4)):
        table(Progress(stage, step, 9, 2.5))
    first, titles, *_ = shown(table)
    assert first.startswith("stage 1  after 2 others")
    assert titles.startswith("data owner")
    table(Progress("stage 1", 9, 9, 2.5))
    assert shown(table)[0].startswith("stage 1  after 2 others")
    assert shown(table)[1] == titles


def test_lines_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("scaleot_ray.cli.bars.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    with RunTable(["alice", "bob"], 2, stream) as table:
        table(Progress("stage 1", 9, 9, 2.5))
        for number in (1, 2):
            table.change(TenantState("alice", "tuning", number))
            for step in range(1, 31):
                now[0] += 1.0
                table(Progress("tune alice", step, 30, 2.5, tenant="alice", round=number))
        table.change(TenantState("bob", "waiting", 2, "died and starts again (2 of 3)"))
        table.change(TenantState("bob", "left out", 2, "bob took too long."))
    assert stream.getvalue().splitlines() == [
        "stage 1: 9/9  loss 2.500",
        *(f"round {number}, tune alice: {step}/30  loss 2.500" for number in (1, 2) for step in (1, 16, 30)),
        "round 2, bob: waiting: died and starts again (2 of 3)",
        "round 2, bob: left out: bob took too long.",
    ]


def test_on_a_terminal_it_is_drawn_and_stays() -> None:
    main, side = pty.openpty()
    with os.fdopen(side, "w") as stream, RunTable(["alice", "bob"], 1, stream) as table:
        tuning(table, "alice")
        table(Progress("tune alice", 3, 10, 2.5, tenant="alice", round=1))
        table.change(TenantState("alice", "submitted", 1))
        table.change(TenantState("bob", "left out", 1, "bob took too long."))
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", _all_of(main))
    assert "loading" in text
    last = text.rstrip().splitlines()[-3:]
    assert last[0].split() == ["bob", "left", "out:", "took", "too", "long."]
    assert last[1].split() == ["alice", "submitted", "2.500"]
    assert last[2] == "1 submitted, 1 left out"
