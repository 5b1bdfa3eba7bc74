"""An emulator that is built anew lets nobody back in, and does not keep what a data owner withdraws."""

from __future__ import annotations

from pathlib import Path

import pytest

from scaleot_ray.config import AggregationSettings, RoundSettings
from scaleot_ray.errors import ConfigError
from scaleot_ray.federation.rounds.registry import AGGREGATE, Registry
from scaleot_ray.federation.rounds.round_keeper import RoundKeeper
from tests.federation.rounds.keeper_bench import NAMES, Bench
from tests.federation.rounds.tiny_deltas import TinyDeltas


@pytest.fixture(scope="module")
def emulators(tiny: TinyDeltas, tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyDeltas, TinyDeltas]:
    """Two of one model."""
    second = TinyDeltas.build(tmp_path_factory.mktemp("second"), emulator={"beta": 0.4})
    assert tiny.emulator.digest != second.emulator.digest
    return tiny, second


@pytest.fixture
def before(emulators: tuple[TinyDeltas, TinyDeltas], tmp_path: Path) -> Bench:
    """Two rounds of three data owners on the first emulator."""
    bench = Bench(emulators[0], tmp_path, rounds=RoundSettings(count=2), aggregation=AggregationSettings())
    for number in (1, 2):
        assert bench.begin() == number
        for value, name in zip((1, 2, 6), NAMES, strict=True):  # no mean is one of them
            bench.send(name, number, float(value * number))
        assert bench.keeper.end(number).state == "finished"
    return bench


def anew(emulators: tuple[TinyDeltas, TinyDeltas], before: Bench) -> Bench:
    """The same run's keeper once the emulator was built anew."""
    before.keeper.registry.close()
    return Bench(emulators[1], before.folder, **before.settings)


def test_who_was_excluded_stays_so(emulators: tuple[TinyDeltas, TinyDeltas], before: Bench) -> None:
    before.keeper.revoke("ben", "asked for it")
    before.keeper.set_state("cas", "cancelled", "left")
    after = anew(emulators, before)
    assert [after.keeper.admit(name, {}) is None for name in NAMES] == [False, True, True]
    found = {one.name: (one.state, one.reason) for one in after.keeper.registry.tenants.all()}
    assert found == {"ann": ("admitted", None), "ben": ("revoked", "asked for it"), "cas": ("cancelled", "left")}
    assert after.keeper.admit("ben", {}) is None
    with pytest.raises(ConfigError, match="which is final"):
        after.keeper.set_state("cas", "admitted", "")


def test_who_was_excluded_stays_so_where_the_registry_was_moved(
    emulators: tuple[TinyDeltas, TinyDeltas], before: Bench
) -> None:
    before.keeper.revoke("ben", "asked for it")
    before.keeper.registry.close()
    (before.folder / "r").rename(before.folder / "moved")
    other = emulators[1].emulator.manifest
    place = (before.folder, before.folder / "c", before.folder / "moved")
    with RoundKeeper(other, *place, before.audit, **before.settings) as keeper:
        assert [keeper.admit(name, {}) is None for name in NAMES] == [False, True, False]
        keeper.revoke("cas", "left")
    (path,) = (before.folder / "moved").glob(f"{emulators[0].emulator.digest[:16]}/registry.sqlite")
    with Registry(path, write=False) as registry:
        assert registry.tenants.get("cas").state == "revoked"


def test_a_revocation_reaches_what_came_before(emulators: tuple[TinyDeltas, TinyDeltas], before: Bench) -> None:
    (path,) = (before.folder / "r").glob("*/registry.sqlite")
    kept = before.folder / "c" / path.parent.name / "deltas"
    assert len(list(kept.iterdir())) == 8
    after = anew(emulators, before)
    assert after.keeper.revoke("ben", "asked for it") == []  # of this emulator, on which it never was
    assert after.keeper.admit("ben", {}) is None
    with Registry(path, write=False) as registry:
        assert registry.tenants.get("ben").state == "revoked"
        active = {(one.name, one.round) for one in registry.plug_ins.all() if one.state == "active"}
        theirs = {one.digest for one in registry.submissions.of_tenant("ben")}
    assert active == {(name, number) for name in ("ann", "cas") for number in (1, 2)}
    assert AGGREGATE not in {name for name, _ in active}
    assert len(theirs) == 2
    assert not theirs & {path.name for path in kept.iterdir()}
    written = path.stat().st_mtime_ns
    again = anew(emulators, after)
    assert path.stat().st_mtime_ns == written  # nothing was left to do
    with pytest.raises(ConfigError, match="no data owner 'dora' in this run"):
        again.keeper.revoke("dora", "")


def test_a_revocation_that_was_cut_short_there_is_finished(
    emulators: tuple[TinyDeltas, TinyDeltas], before: Bench
) -> None:
    (path,) = (before.folder / "r").glob("*/registry.sqlite")
    deltas = before.folder / "c" / path.parent.name / "deltas"
    theirs = {one.digest for one in before.keeper.registry.submissions.of_tenant("ben")}
    after = anew(emulators, before)
    deltas.rename(before.folder / "kept")
    deltas.touch()  # neither deltas nor aggregates can be removed
    after.keeper.revoke("ben", "asked for it")
    with Registry(path, write=False) as registry:
        assert registry.tenants.get("ben").state == "revoked"
    deltas.unlink()
    (before.folder / "kept").rename(deltas)
    assert len(theirs & {path.name for path in deltas.iterdir()}) == 2
    anew(emulators, after)
    assert not theirs & {path.name for path in deltas.iterdir()}


def test_of_a_server_optimizer_nothing_is_left_either(emulators: tuple[TinyDeltas, TinyDeltas], tmp_path: Path) -> None:
    how = AggregationSettings(server="momentum")
    bench = Bench(emulators[0], tmp_path, rounds=RoundSettings(count=2), aggregation=how)
    bench.send("ben", bench.begin(["ben"]), 3.0)
    bench.keeper.end(1)  # its state is what ben sent
    assert list(tmp_path.glob("c/*/server/*"))
    anew(emulators, bench).keeper.revoke("ben", "asked for it")
    assert not list(tmp_path.glob("c/*/server/*"))
