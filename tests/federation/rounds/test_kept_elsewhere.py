"""Rounds whose artefacts are kept on a file system of ``pyarrow.fs``: nothing is lost with this machine's copies."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from scaleot_ray.config import AggregationSettings, RoundSettings
from scaleot_ray.errors import ArtifactRefused, ConfigError, ResourcesMissing, RunFailed
from scaleot_ray.federation.rounds.administration import Request, administer
from scaleot_ray.federation.rounds.artifact_location import Location
from scaleot_ray.federation.rounds.registry import AGGREGATE
from scaleot_ray.federation.rounds.status import run_status
from scaleot_ray.federation.run import run_local
from scaleot_ray.resources.session import Session
from tests.federation.rounds.faulty_filesystem import faulty
from tests.federation.rounds.keeper_bench import NAMES, Bench
from tests.federation.rounds.tiny_deltas import TinyDeltas, ended_run
from tests.tiny_run import write_tiny_run


class Elsewhere(Bench):
    """A keeper whose artefacts are on a file system that can fail."""

    def __init__(self, tiny: TinyDeltas, folder: Path) -> None:
        super().__init__(tiny, folder)
        location, self.handler = faulty(folder / "remote")
        self.new(artifacts=location, aggregation=AggregationSettings())

    def on_another_machine(self) -> None:
        """The keeper that comes after the one that is, with the registry and none of the artefacts here."""
        self.keeper.registry.close()
        shutil.rmtree(self.folder / "c", ignore_errors=True)
        self.new()

    def kept(self) -> set[str]:
        """Digests of what is in the store."""
        return {path.name for path in self.handler.root.glob("runs/*/*/deltas/*")}

    def here(self) -> set[str]:
        """Digests of what takes room on this machine."""
        return {path.name for path in self.folder.glob("c/*/cache/*")}


@pytest.fixture
def bench(tiny: TinyDeltas, tmp_path: Path) -> Elsewhere:
    return Elsewhere(tiny, tmp_path)


def test_rounds_go_on_without_the_copies_of_this_machine(bench: Elsewhere) -> None:
    momentum = AggregationSettings(server="momentum", server_momentum=0.5)
    bench.new(rounds=RoundSettings(count=3), aggregation=momentum)
    for turn, value in enumerate((1.0, 2.0, 4.0), start=1):
        number = bench.begin(["ann", "ben"])
        bench.on_another_machine()
        assert bench.send("ann", number, value).folder.startswith("faulty://store/runs/")
        bench.on_another_machine()
        bench.send("ben", number, value)
        bench.on_another_machine()
        assert bench.keeper.end(number).state == "finished"
        bench.on_another_machine()
        assert (number, bench.value("ann")) == (turn, value)
    # 1; 1 more and half of the first 1; what is lacking to 4 and half of 1.5.
    assert bench.value(AGGREGATE) == 4.75
    assert not list(bench.folder.glob("c/*/deltas")) + list(bench.folder.glob("c/*/server"))


def test_only_the_last_round_takes_room_here(bench: Elsewhere) -> None:
    bench.new(rounds=RoundSettings(count=3))
    for turn in range(3):
        number = bench.begin()
        for value, name in enumerate(NAMES, start=1):
            bench.send(name, number, float(turn + value))
        bench.keeper.end(number)
        registry = bench.keeper.registry
        latest = {one.digest for one in registry.submissions.of_round(number)}
        aggregate = registry.plug_ins.in_force(AGGREGATE)
        assert aggregate is not None
        assert bench.here() == latest | {aggregate.digest}
    assert len(bench.kept()) > len(bench.here())


def test_what_was_uploaded_and_not_committed_counts_once_or_not_at_all(bench: Elsewhere) -> None:
    number = bench.begin()
    overtaken = bench.keeper
    bench.new()
    for name, value in (("ann", 1.0), ("ben", 9.0)):
        with pytest.raises(RunFailed, match="another coordinator has taken this run over"):
            overtaken.take(bench.sent(name, number, value))
    assert (len(bench.kept()), bench.keeper.taking_part(number)) == (2, dict.fromkeys(NAMES, False))
    before = len(bench.handler.written)
    submission = bench.send("ann", number, 1.0)
    assert bench.send("ann", number, 1.0) == submission
    assert len(bench.handler.written) == before  # it was there, whole
    bench.send("ben", number, 2.0)  # another one than the first time
    bench.send("cas", number, 6.0)
    bench.on_another_machine()
    bench.keeper.end(number)
    assert bench.value(AGGREGATE) == 3.0
    assert len(bench.kept()) == 5
    bench.keeper.revoke("cas", "left")
    assert bench.value(AGGREGATE) == 1.5
    assert bench.kept() == {one.digest for one in bench.keeper.registry.plug_ins.all() if one.state == "active"}


def test_nothing_is_acknowledged_that_is_not_in_the_store(bench: Elsewhere) -> None:
    number = bench.begin()
    bench.handler.room = 1000
    with pytest.raises(ResourcesMissing, match=r"artifacts: .* cannot be written \(.*connection lost"):
        bench.send("ann", number, 1.0)
    bench.handler.room, bench.handler.answers = None, 0
    with pytest.raises(ResourcesMissing, match=r"cannot be .* \(.*no answer"):
        bench.send("ann", number, 1.0)
    assert bench.keeper.taking_part(number) == dict.fromkeys(NAMES, False)
    assert bench.keeper.registry.tenants.refusals("ann") == []  # not its fault
    bench.handler.answers = None
    for name in NAMES:
        bench.send(name, number, 2.0)
    bench.on_another_machine()
    bench.handler.answers = 3
    with pytest.raises(ResourcesMissing, match="cannot be read"):
        bench.keeper.end(number)
    assert bench.keeper.registry.rounds.get(number).state == "closed"
    bench.handler.answers = None
    assert bench.keeper.begin(NAMES) is None  # which ends the round that was closed
    assert bench.value(AGGREGATE) == 2.0


def test_a_state_that_was_cut_short_is_not_gone_on_with_in_another_way(bench: Elsewhere) -> None:
    momentum, answers = AggregationSettings(server="momentum", server_momentum=0.5), 0
    bench.new(rounds=RoundSettings(count=2), aggregation=momentum)
    bench.send("ann", bench.begin(["ann"]), 1.0)
    while not list(bench.handler.root.glob("runs/*/*/server/1.safetensors")):
        bench.handler.answers = answers
        with pytest.raises(ResourcesMissing):
            bench.keeper.end(1)
        answers += 1
    bench.handler.answers = None
    bench.new(aggregation=AggregationSettings())
    assert bench.begin(["ann"]) == 2  # the first is ended by that, without momentum
    bench.new(aggregation=momentum)
    bench.send("ann", bench.begin(["ann"]), 2.0)
    bench.keeper.end(2)
    assert bench.value(AGGREGATE) == 2.0


def test_a_damaged_aggregate_is_no_fault_of_the_next_sender(bench: Elsewhere) -> None:
    bench.new(rounds=RoundSettings(count=2))
    bench.send("ann", bench.begin(["ann"]), 1.0)
    bench.keeper.end(1)
    second = bench.begin(["ann"])
    start = bench.keeper.registry.rounds.get(second).start
    (path,) = bench.handler.root.glob(f"runs/*/*/deltas/{start}/tensors.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    bench.on_another_machine()
    with pytest.raises(ArtifactRefused, match=f"artifacts: faulty://.*/{start}: tensor .* was altered"):
        bench.send("ann", second, 2.0)
    assert bench.keeper.registry.tenants.refusals("ann") == []
    path.write_bytes(whole)
    bench.send("ann", second, 2.0)


def test_too_long_a_delta_never_reaches_the_store(bench: Elsewhere) -> None:
    bench.new(rounds=RoundSettings(max_norm=1.0))
    number = bench.begin()
    with pytest.raises(ArtifactRefused, match=r"above rounds.max_norm=1"):
        bench.send("ann", number, 1.0)
    assert (bench.handler.written, bench.here()) == ([], set())
    assert len(bench.keeper.registry.tenants.refusals("ann")) == 1


def test_a_revocation_that_was_cut_short_is_finished_by_the_next(bench: Elsewhere) -> None:
    bench.new(rounds=RoundSettings(count=2))
    for value in (1.0, 5.0):
        number = bench.begin()
        for shift, name in enumerate(NAMES):
            bench.send(name, number, value + shift)
        bench.keeper.end(number)
    bench.on_another_machine()
    answers = 0
    while True:
        bench.handler.answers = answers
        try:
            bench.keeper.revoke("cas", "left")
            break
        except ResourcesMissing:
            answers += 17
    bench.handler.answers = None
    bench.on_another_machine()
    assert answers > 17
    assert bench.value(AGGREGATE) == 5.0  # 1.5, and from the 2 that round 2 began with: 3 and 4 further
    assert bench.kept() >= {one.digest for one in bench.keeper.registry.plug_ins.all() if one.state == "active"}
    gone = {one.digest for one in bench.keeper.registry.submissions.of_tenant("cas")}
    assert not bench.kept() & gone


def test_two_runs_keep_artefacts_in_one_place(tiny: TinyDeltas, tmp_path: Path) -> None:
    location, benches = Location.of(f"file://{tmp_path}/kept"), []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        bench = Bench(tiny, tmp_path / name)
        bench.new(artifacts=location)
        bench.send("ann", bench.begin(["ann"]), 1.0)
        bench.keeper.end(1)
        benches.append(bench)
    benches[0].keeper.revoke("ann", "left")
    shutil.rmtree(tmp_path / "two" / "c")
    benches[1].new()
    assert benches[1].value("ann") == 1.0


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_run_moves_to_another_place_with_all_it_has(tiny: TinyDeltas, tmp_path: Path, scheme: str) -> None:
    bench = Bench(tiny, tmp_path)
    bench.send("ann", bench.begin(["ann"]), 1.0)
    bench.keeper.end(1)
    bench.keeper.registry.close()
    with pytest.raises(ConfigError, match=r"artifacts: 1 artefacts of this run are not in .*/new/.*/deltas") as caught:
        bench.new(artifacts=Location.of(f"{scheme}{tmp_path}/new"))
    here, there = caught.value.remedy.removeprefix("Copy the folder ").split(", where they are, to ")
    there = there.partition(";")[0].removeprefix(scheme)
    shutil.copytree(here, there)
    bench.new()
    shutil.rmtree(tmp_path / "c", ignore_errors=True)
    assert bench.value("ann") == 1.0
    found = bench.keeper.registry.plug_ins.in_force("ann")
    assert found is not None
    assert found.folder == f"{scheme}{there}/deltas/{found.digest}"
    bench.new(artifacts=None)  # left out again: where it is
    assert bench.value("ann") == 1.0


def test_a_run_that_has_ended_is_administered(tiny: TinyDeltas, tmp_path: Path) -> None:
    run = ended_run(tiny, tmp_path, f"file://{tmp_path}/kept")
    shutil.rmtree(run.coordinator / tiny.emulator.digest[:16])
    before = run_status(run)
    ben = next(one for one in before["tenants"] if one["name"] == "ben")["plug_in"]["directory"]
    assert ben.startswith(f"file://{tmp_path}/kept/")
    assert Path(ben.removeprefix("file://")).is_dir()
    assert administer(run, Request("revoke", "ben", "withdrew consent")) == [1]
    after = run_status(run)
    assert not Path(ben.removeprefix("file://")).exists()
    assert after["aggregate"]["digest"] != before["aggregate"]["digest"]
    assert Path(after["aggregate"]["directory"].removeprefix("file://")).is_dir()


def test_a_whole_run_keeps_its_artefacts_elsewhere(tmp_path: Path, connected_ray: Session) -> None:
    changes = {"tune": {"steps": 5, "block_size": 32}, "rounds": {"count": 2}, "aggregation": {}}
    settings = write_tiny_run(tmp_path, artifacts=f"file://{tmp_path}/kept", **changes)
    report = run_local(settings).as_json()
    assert [one["state"] for one in report["rounds"]] == ["finished", "finished"]
    assert report["aggregate"]["directory"].startswith(f"file://{tmp_path}/kept/")
    assert all(tenant["aggregate"] is not None for tenant in report["tenants"])
    assert len(list(tmp_path.glob("kept/*/*/deltas/*/manifest.sha256"))) == 6
    assert not list(tmp_path.glob("run/coordinator/*/deltas"))
    shutil.rmtree(next(tmp_path.glob("run/coordinator/*/cache")))
    again = run_local(settings).as_json()  # finished before
    assert again["aggregate"] == report["aggregate"]
