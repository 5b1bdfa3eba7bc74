"""Pausing, cancelling and revoking data owners of a run that is under way, and of one that is not."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from scaleot_ray.errors import ArtifactRefused, ConfigError, Interrupted, ResourcesMissing, RunFailed, ScaleOTError
from scaleot_ray.federation.folder import RunFolder
from scaleot_ray.federation.rounds.administration import Request, administer, pending, reply
from scaleot_ray.federation.rounds.status import run_status
from scaleot_ray.federation.run import run_local
from scaleot_ray.progress import Progress, TenantState
from scaleot_ray.resources.session import Session
from scaleot_ray.stages.record import write_record
from tests.federation.rounds.tiny_deltas import TinyDeltas, ended_run
from tests.tiny_run import write_tiny_run


@pytest.fixture
def ended(tiny: TinyDeltas, tmp_path: Path) -> RunFolder:
    """A run that has ended after one round of two data owners."""
    return ended_run(tiny, tmp_path)


def by_name(status: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in status["tenants"]}


def test_the_status_of_a_run_that_has_ended(ended: RunFolder) -> None:
    status = run_status(ended)
    assert (status["schema"], status["under_way"], status["directory"]) == ("scaleot.status/1", False, str(ended.path))
    (one,) = status["rounds"]
    assert (one["number"], one["state"], one["quorum"]) == (1, "finished", 2)
    assert [(part["name"], part["state"]) for part in one["tenants"]] == [("ann", "submitted"), ("ben", "submitted")]
    ann = by_name(status)["ann"]
    assert (ann["state"], ann["submissions"], ann["refusals"]) == ("admitted", 1, [])
    assert Path(ann["plug_in"]["directory"]).is_dir()
    assert status["aggregate"]["round"] == 1


def test_revoking_afterwards_remakes_the_aggregate(ended: RunFolder) -> None:
    before = run_status(ended)
    assert administer(ended, Request("revoke", "ben", "withdrew consent")) == [1]
    after = run_status(ended)
    assert (by_name(after)["ben"]["state"], by_name(after)["ben"]["plug_in"]) == ("revoked", None)
    assert after["aggregate"]["digest"] != before["aggregate"]["digest"]
    assert [one["aggregated"] for one in after["rounds"]] == [True]
    assert not Path(by_name(before)["ben"]["plug_in"]["directory"]).exists()
    with pytest.raises(ConfigError, match="There is no data owner 'zoe'"):
        administer(ended, Request("pause", "zoe", ""))
    with pytest.raises(ConfigError, match="ben was revoked, which is final"):
        administer(ended, Request("resume", "ben", ""))


def test_where_no_run_has_been(tmp_path: Path) -> None:
    for ask in (run_status, lambda folder: administer(folder, Request("pause", "ann", ""))):
        with pytest.raises(ConfigError, match="no run with data owners has been here"):
            ask(RunFolder(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()


def test_where_no_run_came_to_its_emulator(ended: RunFolder) -> None:
    ended.emulator.unlink()
    for ask in (run_status, lambda folder: administer(folder, Request("revoke", "ann", ""))):
        with pytest.raises(ConfigError, match="there is no emulator yet") as caught:
            ask(ended)
        assert "model owner" in caught.value.remedy


def test_a_run_that_is_under_way_is_asked(ended: RunFolder) -> None:
    kinds = (ConfigError, ArtifactRefused, ResourcesMissing, RunFailed, Interrupted)
    with ended.held():
        assert run_status(ended)["under_way"]
        with pytest.raises(RunFailed, match=r"did not answer within 0\.5 seconds"):
            administer(ended, Request("pause", "ann", "so"), seconds=0.5)
        assert pending(ended) == []

        def driver() -> None:
            for result in ([1, 2], *errors):
                while not (found := pending(ended)):
                    pass
                asked.extend(request for _, request in found)
                reply(ended, found[0][0], result)

        errors = [kind("no such thing.", "Ask for another.") for kind in kinds]
        asked: list[Request] = []
        thread = threading.Thread(target=driver)
        thread.start()
        assert administer(ended, Request("revoke", "ann", "so")) == [1, 2]
        for kind in kinds:
            with pytest.raises(ScaleOTError, match="no such thing") as refused:
                administer(ended, Request("pause", "zoe", ""))
            assert type(refused.value) is (kind if kind is not Interrupted else RunFailed)
        thread.join()
    assert asked == [Request("revoke", "ann", "so"), *[Request("pause", "zoe", "")] * len(kinds)]
    assert not list(ended.requests.iterdir())


def test_who_gives_up_while_the_run_looks_does_not_end_it(ended: RunFolder) -> None:
    place = ended.requests
    place.mkdir(parents=True, exist_ok=True)
    (place / "gone.ask.json").symlink_to(place / "nothing")  # listed, and not there any more
    write_record(place / "b.ask.json", {"action": "pause", "tenant": "ben", "reason": ""})
    time.sleep(0.02)
    write_record(place / "a.ask.json", {"action": "resume", "tenant": "ben", "reason": ""})
    assert [(name, request.action) for name, request in pending(ended)] == [("b", "pause"), ("a", "resume")]


def test_a_run_that_ends_before_it_answers_is_not_waited_for(ended: RunFolder) -> None:
    release = threading.Event()

    def run() -> None:
        with ended.held():
            held.set()
            release.wait(20)

    held = threading.Event()
    thread = threading.Thread(target=run)
    thread.start()
    held.wait(20)
    threading.Timer(0.5, release.set).start()
    assert administer(ended, Request("revoke", "ben", "left"), seconds=20) == [1]
    thread.join()


def test_who_is_cancelled_while_it_tunes_is_not_waited_for(tmp_path: Path, connected_ray: Session) -> None:
    tune = {"steps": 20, "block_size": 32}
    settings = write_tiny_run(tmp_path, evaluator=False, tune=tune, rounds={"quorum": 1}, aggregation={})
    endless = settings.tenants[1].model_copy(update={"tune": settings.tune.model_copy(update={"steps": 1_000_000})})
    settings = settings.model_copy(update={"tenants": (settings.tenants[0], endless)})
    folder, asked, states = RunFolder(Path(settings.output)), list[threading.Thread](), list[TenantState]()

    def on_progress(progress: Progress) -> None:
        if progress.stage == "tune bob" and progress.step > 30 and not asked:
            asked.append(threading.Thread(target=administer, args=(folder, Request("cancel", "bob", "too slow"))))
            asked[0].start()

    report = run_local(settings, on_progress=on_progress, on_state=states.append).as_json()
    asked[0].join()
    (one,) = report["rounds"]
    assert (one["submitted"], one["missing"]) == (["alice"], {"bob": "bob was cancelled: too slow."})
    assert [told for told in states if told.tenant == "bob"][-1] == TenantState(
        "bob", "left out", 1, "bob was cancelled: too slow."
    )
    status = run_status(folder)
    assert (by_name(status)["bob"]["state"], status["under_way"]) == ("cancelled", False)
    states.clear()
    run_local(settings, on_state=states.append)  # everything is done
    assert states == [TenantState("alice", "submitted", 1), TenantState("bob", "left out", None, "it takes no part")]
