"""``scaleot status``, ``tenants`` and ``revoke`` on a run that has ended."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.command import Warm
from tests.cli.documented_keys import JsonPage
from tests.federation.rounds.tiny_deltas import TinyDeltas, ended_run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyDeltas:
    """The emulator of all tests."""
    return TinyDeltas.build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def folder(tiny: TinyDeltas, tmp_path: Path) -> Path:
    """A folder with a run."""
    ended_run(tiny, tmp_path)
    return tmp_path


def test_status_shows_rounds_and_data_owners(warm: Warm, folder: Path) -> None:
    done = warm.scaleot("status", "run", cwd=folder)
    assert done.code == 0
    assert "run is not under way" in done.out
    assert [line.split() for line in done.out.splitlines() if "submitted" in line] == [
        ["1", "finished", "0:00", "ann", "submitted"],
        ["ben", "submitted"],
    ]
    assert "aggregate of round 1: " in done.out


def test_pausing_cancelling_and_revoking(warm: Warm, folder: Path) -> None:
    paused = warm.scaleot("tenants", "run", "--pause", "ben", "--reason", "new data on Monday", cwd=folder)
    assert paused.code == 0
    assert "paused (new data on Monday)" in paused.out
    assert "admitted" in warm.scaleot("tenants", "run", "--resume", "ben", cwd=folder).out
    assert "cancelled" in warm.scaleot("tenants", "run", "--cancel", "ben", cwd=folder).out
    revoked = warm.scaleot("revoke", "run", "ben", "--reason", "withdrew consent", cwd=folder)
    assert (revoked.code, "made anew without ben" in revoked.err) == (0, True)
    (row,) = [line for line in revoked.out.splitlines() if "ben" in line]
    assert ("revoked (withdrew consent)" in row, "round 1" in row) == (True, False)
    last = warm.scaleot("revoke", "run", "ann", cwd=folder)
    assert "The aggregate of round 1 was withdrawn: without ann there is none." in last.err


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["status", "nowhere"], "nowhere: no run with data owners has been here."),
        (["tenants", "run", "--pause", "zoe"], "There is no data owner 'zoe' in this run."),
        (["tenants", "run", "--pause", "ann", "--cancel", "ben"], "--pause and --cancel are given at once."),
        (["revoke", "run", "zoe"], "There is no data owner 'zoe' in this run."),
    ],
)
def test_what_a_user_can_get_wrong(warm: Warm, folder: Path, arguments: list[str], problem: str) -> None:
    done = warm.scaleot(*arguments, cwd=folder)
    assert (done.code, done.out) == (2, "")
    assert problem in done.err
    assert "Traceback" not in done.err


def test_json_keys_are_those_of_the_page(warm: Warm, folder: Path) -> None:
    documents = [
        warm.scaleot(*arguments, "--format", "json", cwd=folder).json
        for arguments in (["status", "run"], ["tenants", "run"], ["revoke", "run", "ben"])
    ]
    for document in documents:
        assert JsonPage().undocumented(document) == set()
    nothing_was = {f"{of}refusals[].{key}" for of in ("", "tenants[].") for key in ("reason", "count")}
    assert JsonPage().gone(*documents) <= nothing_was
