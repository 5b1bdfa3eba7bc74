"""An emulator that is built anew lets nobody back in, and does not keep what a data owner withdraws."""

from __future__ import annotations

from pathlib import Path

import pytest

from scaleot_ray.config import AggregationSettings, RoundSettings
from scaleot_ray.errors import ConfigError
from scaleot_ray.federation.rounds.registry import AGGREGATE, Registry
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
