"""A group of workers on Ray: what it makes, and what becomes of it when one dies or there is no place for it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from ray.util.placement_group import placement_group_table

from scaleot_ray.config import DataSettings, EmulatorSettings, ModelSettings, ParallelSettings, StageOneSettings
from scaleot_ray.emulator.stage_one import StageOne
from scaleot_ray.errors import ResourcesMissing, RunFailed, ScaleOTError
from scaleot_ray.parallel.build import steps_by_group
from scaleot_ray.parallel.group import Group
from scaleot_ray.progress import Progress
from scaleot_ray.resources.session import Session
from scaleot_ray.stages.build import build
from tests.tiny_models import save_tiny
from tests.tiny_run import write_tiny_run

STAGE_ONE = StageOneSettings(
    harmonizer_rank=8,
    activation="silu",
    start_tokens=256,
    generated_tokens=128,
    batch_size=4,
    block_size=16,
    steps=24,
    learning_rate=3e-4,
    score_every=4,
    candidates=3,
    checkpoint_every=3,
)
EMULATOR = EmulatorSettings(plug_in_layers=2, alpha=0.5, beta=0.6, fit_tokens=256, fit_steps=2)


class Owner:
    """A model owner's files, and builds from them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.public: DataSettings = write_tiny_run(folder).public
        self.model = ModelSettings(path=str(save_tiny(folder / "a-model")), device="cpu")

    def stage_one(
        self,
        name: str,
        on_progress: Callable[[Progress], None] | None = None,
        stream: bool = False,
        stage_one: StageOneSettings = STAGE_ONE,
        **parallel: Any,
    ) -> StageOne:
        """What stage 1 leaves in the cache ``name``."""
        cache, take = self.folder / name, None
        if parallel:
            group = ParallelSettings(**{"workers": 2, **parallel})
            take = steps_by_group(group, self.model, self.public, stage_one, debug=False)
        settings = stage_one.model_copy(update={"generated_tokens": 0}) if stream else stage_one
        build(
            self.model,
            self.public,
            settings,
            EMULATOR,
            self.folder / f"{name}-emulator",
            cache=cache,
            stream=stream,
            take_steps=take,
            on_progress=on_progress,
        )
        (file,) = cache.glob("*/stage_one.safetensors")
        return StageOne.load(file, with_moments=False)[0]


@pytest.fixture(scope="module")
def owner(tmp_path_factory: pytest.TempPathFactory) -> Owner:
    return Owner(tmp_path_factory.mktemp("owner"))


@pytest.fixture(scope="module")
def undisturbed(owner: Owner, connected_ray: Session) -> StageOne:
    """By two workers that nobody disturbs."""
    return owner.stage_one("undisturbed", zero=3)


def test_two_workers_end_where_one_process_ends(owner: Owner, undisturbed: StageOne) -> None:
    alone = owner.stage_one("alone")
    assert [one.get("replaced") for one in undisturbed.history] == [one.get("replaced") for one in alone.history]
    for index, values in alone.harmonizers.items():
        for name, value in values.items():
            torch.testing.assert_close(undisturbed.harmonizers[index][name], value, rtol=1e-3, atol=1e-4)
    assert undisturbed.scores == pytest.approx(alone.scores, rel=1e-3, abs=1e-3)


def same(one: StageOne, other: StageOne) -> bool:
    return (one.scores, one.history) == (other.scores, other.history) and all(
        torch.equal(value, other.harmonizers[index][name])
        for index, values in one.harmonizers.items()
        for name, value in values.items()
    )


def workers() -> list[psutil.Process]:
    """Processes of living workers on this test's own Ray."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.cmdline()[:1] in (
                ["ray::Worker.work"],
                ["ray::Worker"],
                ["ray::Worker.news"],
            ):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_worker_costs_only_the_steps_since_the_last_checkpoint(
    owner: Owner, undisturbed: StageOne, rank: int
) -> None:
    heard: list[Progress] = []
    killed: list[int] = []

    def kill(progress: Progress) -> None:
        heard.append(progress)
        if progress.stage == "stage 1" and progress.step >= 5 and not killed:
            killed.append(sorted(process.pid for process in workers())[rank])
            os.kill(killed[0], signal.SIGKILL)

    found = owner.stage_one(f"killed-{rank}", kill, zero=3)
    assert same(found, undisturbed)
    again = [report.stage for report in heard if "goes on from step" in report.stage]
    assert len(again) == 1
    assert " died: its process was killed" in again[0]
    assert int(again[0].rsplit(" ", 1)[1]) >= 3
    assert not workers()


def test_a_group_that_never_gets_any_further_is_given_up(owner: Owner, connected_ray: Session) -> None:
    started: set[int] = set()
    long = STAGE_ONE.model_copy(update={"steps": 2000, "checkpoint_every": 2000})

    def kill_each(progress: Progress) -> None:
        if progress.stage == "stage 1":
            for process in workers():
                started.add(process.pid)
                process.kill()

    with pytest.raises(RunFailed) as caught:
        owner.stage_one("never", kill_each, stage_one=long, zero=2, attempts=2)
    assert "started 2 times without getting any further" in caught.value.problem
    assert len(started) == 4


def test_streamed_start_and_emulator_around_the_steps_of_a_group(owner: Owner, connected_ray: Session) -> None:
    found = owner.stage_one("streamed", stream=True, zero=3)
    assert (found.step, found.settings.generated_tokens) == (STAGE_ONE.steps, 0)
    assert len([one for one in found.history if "loss" in one]) == STAGE_ONE.steps


def test_without_a_place_it_says_what_it_asked_for_and_what_there_is(owner: Owner, connected_ray: Session) -> None:
    with pytest.raises(ResourcesMissing) as caught:
        owner.stage_one("no-place", workers=4, timeout=1)
    assert "4 workers with 1 CPU each found no place within 1 seconds" in caught.value.problem
    assert "2 processors" in caught.value.problem
    assert "parallel.workers" in caught.value.remedy


@pytest.mark.parametrize("where", ["nowhere", "another"])
def test_a_worker_without_the_builds_own_model_says_so(
    owner: Owner, connected_ray: Session, tmp_path: Path, where: str
) -> None:
    if where == "another":
        save_tiny(tmp_path / where, seed=1)
    other = owner.model.model_copy(update={"path": str(tmp_path / where)})
    take = steps_by_group(ParallelSettings(workers=2), other, owner.public, STAGE_ONE)
    with pytest.raises(ScaleOTError) as caught:
        build(owner.model, owner.public, STAGE_ONE, EMULATOR, tmp_path / "e", cache=tmp_path / "c", take_steps=take)
    assert "worker" in caught.value.problem
    assert "model.path" in caught.value.problem
    assert where in caught.value.problem
    assert not workers()


def test_interrupted_while_it_waits_for_its_place_it_claims_nothing(owner: Owner, connected_ray: Session) -> None:
    before = len(placement_group_table())
    parallel = ParallelSettings(workers=4, timeout=60)

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    handler = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 1)
    try:
        with pytest.raises(KeyboardInterrupt), Group(parallel, connected_ray):
            pass
    finally:
        signal.signal(signal.SIGALRM, handler)
    waiting = [one for one in placement_group_table().values() if one["state"] == "PENDING"]
    assert len(placement_group_table()) == before + 1
    assert not waiting
