"""A run goes on with its own registry or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from scaleot_ray.errors import ConfigError
from scaleot_ray.federation.folder import RunFolder
from scaleot_ray.federation.preflight import check_registry
from scaleot_ray.federation.rounds.administration import Request, administer, note_registry
from scaleot_ray.federation.rounds.status import run_status
from tests.federation.rounds.tiny_deltas import TinyDeltas, ended_run
from tests.tiny_run import write_tiny_run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyDeltas:
    """The emulator of all tests."""
    return TinyDeltas.build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def run(tiny: TinyDeltas, tmp_path: Path) -> RunFolder:
    """A run that has ended, and that ben was revoked from; its registry is in ``elsewhere``."""
    folder = ended_run(tiny, tmp_path)
    administer(folder, Request("revoke", "ben", "withdrew consent"))
    return folder


def states(run: RunFolder) -> dict[str, str]:
    return {one["name"]: one["state"] for one in run_status(run)["tenants"]}


def test_where_it_is_not_nothing_begins_anew(run: RunFolder, tmp_path: Path) -> None:
    settings = write_tiny_run(tmp_path, registry=str(tmp_path / "elsewhere"))
    check_registry(settings)
    (tmp_path / "elsewhere").rename(tmp_path / "on-another-machine")
    for ask in (
        lambda: run_status(run),
        lambda: administer(run, Request("pause", "ann", "")),
        lambda: check_registry(settings),
    ):
        with pytest.raises(ConfigError, match=r"this run's registry is not .*: there is none\. It was ") as caught:
            ask()
        assert "with nobody revoked" in caught.value.remedy
    assert not list((tmp_path / "elsewhere").rglob("*.sqlite"))


def test_it_may_be_moved(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").rename(tmp_path / "moved")
    note_registry(run, str(tmp_path / "moved"))
    administer(run, Request("pause", "ann", ""))
    assert states(run) == {"ann": "paused", "ben": "revoked"}


def test_that_of_another_run_is_not_touched(run: RunFolder, tiny: TinyDeltas, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = ended_run(tiny, tmp_path / "other")
    note_registry(run, str(tmp_path / "other" / "elsewhere"))
    with pytest.raises(ConfigError, match="that is the registry of another run"):
        administer(run, Request("cancel", "ann", ""))
    assert states(other) == {"ann": "admitted", "ben": "admitted"}


def test_rounds_begin_anew_for_whoever_says_so(run: RunFolder, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "elsewhere")
    with pytest.raises(ConfigError) as caught:
        administer(run, Request("pause", "ann", ""))
    Path(caught.value.remedy.split("remove ")[1].removesuffix(".")).unlink()
    with pytest.raises(ConfigError, match="There is no data owner 'ann'"):
        administer(run, Request("pause", "ann", ""))
