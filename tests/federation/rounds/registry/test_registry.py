"""Rounds, submissions and plug-ins: what counts, what is refused, what is revoked."""

from __future__ import annotations

from pathlib import Path

import pytest

from scaleot_ray.errors import ArtifactRefused, ConfigError
from scaleot_ray.federation.rounds.registry import AGGREGATE, NewPlugIn, Registry, UnknownSender
from scaleot_ray.federation.rounds.registry.tenants import REFUSALS_KEPT
from tests.federation.rounds.registry.filled import EMULATOR, Clock, delta_of, filled

ALL = ["ann", "ben", "cas"]


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return filled(tmp_path / "r.sqlite")


def open_round(registry: Registry, quorum: int = 2, names: list[str] = ALL) -> int:
    return registry.rounds.open(EMULATOR.digest(), names, quorum).number


def result(registry: Registry, name: str, number: int, digest: str | None = None, without: str = "") -> NewPlugIn:
    made_from = [one for one in registry.submissions.of_round(number) if one.tenant != without]
    if name != AGGREGATE:
        made_from = [one for one in made_from if one.tenant == name]
    return NewPlugIn(name, digest or f"{name}-{number}", f"plug-ins/{name}", {"method": "mean"}, made_from)


def whole_round(registry: Registry, names: list[str] = ALL) -> int:
    number = open_round(registry, len(names), names)
    for name in names:
        registry.submissions.add(delta_of(name, number))
    registry.rounds.close(number)
    registry.plug_ins.finish_round(number, [result(registry, name, number) for name in [*names, AGGREGATE]])
    return number


# Rounds


def test_one_round_at_a_time(registry: Registry) -> None:
    assert open_round(registry) == 1
    with pytest.raises(ConfigError, match="Round 1 is still under way"):
        open_round(registry)
    registry.rounds.fail(1, "stopped")
    assert registry.rounds.get(1).reason == "stopped"
    assert open_round(registry) == 2


@pytest.mark.parametrize("quorum", [0, 4])
def test_a_quorum_of_those_who_take_part(registry: Registry, quorum: int) -> None:
    with pytest.raises(ConfigError, match=f"quorum: {quorum} submissions are asked for, of 3") as refused:
        open_round(registry, quorum)
    assert "between 1 and 3" in refused.value.remedy


def test_a_round_of_nobody_says_who_could_take_part(registry: Registry) -> None:
    with pytest.raises(ConfigError, match="of 0 data owners") as refused:
        open_round(registry, 1, [])
    assert "scaleot tenants --resume" in refused.value.remedy


def test_a_round_closes_without_the_missing(registry: Registry) -> None:
    number = open_round(registry)
    registry.submissions.add(delta_of("ann"))
    registry.submissions.add(delta_of("cas"))
    registry.rounds.begin_part(number, "ben")
    assert registry.rounds.close(number).state == "closed"
    assert {part.tenant: part.state for part in registry.rounds.parts(number)} == {
        "ann": "submitted",
        "ben": "missing",
        "cas": "submitted",
    }
    assert registry.rounds.close(number).state == "closed"  # again: nothing changes


def test_below_its_quorum_a_round_fails_and_says_who_is_missing(registry: Registry) -> None:
    number = open_round(registry)
    registry.submissions.add(delta_of("ann"))
    registry.rounds.end_part(number, "ben", "failed", "its process was killed three times")
    found = registry.rounds.close(number)
    assert found.state == "failed"
    assert found.reason == (
        "1 of the 2 submissions of its quorum (ben: its process was killed three times; cas: submitted nothing in time)"
    )
    assert registry.rounds.current() is None


def test_attempts_are_counted_until_one_submits(registry: Registry) -> None:
    number = open_round(registry)
    assert [registry.rounds.begin_part(number, "ann") for _ in range(3)] == [1, 2, 3]
    registry.submissions.add(delta_of("ann"))
    registry.rounds.end_part(number, "ann", "failed", "killed after it had submitted")
    part = registry.rounds.part(number, "ann")
    assert (part.state, part.reason, part.attempts) == ("submitted", None, 3)
    with pytest.raises(ConfigError, match="zoe takes no part in round 1"):
        registry.rounds.part(number, "zoe")


def test_a_start_that_is_told_of_twice_counts_once(registry: Registry) -> None:
    number = open_round(registry, 1)
    begin = registry.rounds.begin_part
    assert [begin(number, "ann", start) for start in ("one", "one", "two", "two")] == [1, 1, 2, 2]
    registry.submissions.add(delta_of("ben"))
    registry.rounds.close(number)
    assert begin(number, "ann", "three") == 2  # too late to make it one that tunes
    assert registry.rounds.part(number, "ann").state == "missing"


# Submissions


def test_the_same_submission_twice_counts_once(registry: Registry) -> None:
    open_round(registry)
    first = registry.submissions.add(delta_of("ann", weight=3.0))
    assert registry.submissions.add(delta_of("ann", weight=3.0)) == first
    assert registry.submissions.of_round(1) == [first]
    assert (first.weight, first.metrics, first.folder) == (3.0, {"loss": 2.0}, delta_of("ann").folder)
    registry.rounds.close(1)
    assert (
        registry.submissions.add(delta_of("ann")) == first
    )  # its acknowledgement was lost, the round closed meanwhile


def refused(registry: Registry, match: str, *new: object, **settings: int) -> None:
    before = [registry.submissions.of_round(one.number) for one in registry.rounds.all()]
    with pytest.raises(ArtifactRefused, match=match):
        registry.submissions.add(delta_of(*new), **settings)  # type: ignore[arg-type]
    assert [registry.submissions.of_round(one.number) for one in registry.rounds.all()] == before


def test_what_does_not_count(registry: Registry) -> None:
    refused(registry, "round 1 is closed", "ann")
    open_round(registry, names=["ann", "ben"])
    refused(registry, "cas takes no part in round 1", "cas")
    refused(registry, "tuned in round 2, but round 1", "ann", 2)
    registry.submissions.add(delta_of("ann", digest="a" * 64))
    refused(registry, "ann has submitted another delta in round 1", "ann", 1, "b" * 64)
    registry.submissions.add(delta_of("ben", digest="a" * 64))  # the same rows give the same delta
    registry.rounds.close(1)
    refused(registry, "round 1 is closed", "cas")
    registry.plug_ins.finish_round(1, [])
    registry.rounds.open(EMULATOR.digest(), ALL, 2, start="c" * 64)
    refused(registry, "was submitted before in round 1", "ann", 2, "a" * 64)
    refused(registry, "tuned in round 1, but round 2 takes nothing older than round 2", "cas", 1)


def test_a_round_that_begins_alike_takes_the_same_delta_again(registry: Registry) -> None:
    open_round(registry)
    first = registry.submissions.add(delta_of("ann", 1, "a" * 64))
    registry.rounds.fail(1, "its driver was killed")
    open_round(registry)
    again = registry.submissions.add(delta_of("ann", 2, "a" * 64))
    assert ([first], [again]) == (registry.submissions.of_round(1), registry.submissions.of_round(2))


def test_a_failed_round_goes_on(registry: Registry) -> None:
    number = open_round(registry)
    registry.submissions.add(delta_of("ann"))
    assert registry.rounds.close(number).state == "failed"
    found = registry.rounds.reopen(number, ALL, 2, deadline=2000.0)
    assert (found.state, found.reason, found.deadline, found.ended) == ("open", None, 2000.0, None)
    registry.submissions.add(delta_of("ben"))
    assert registry.rounds.close(number).state == "closed"
    with pytest.raises(ConfigError, match="Round 1 is closed"):
        registry.rounds.reopen(number, ALL, 2)
    registry.plug_ins.finish_round(number, [])
    registry.rounds.fail(open_round(registry), "stopped")
    open_round(registry)
    with pytest.raises(ConfigError, match="Round 2 is failed"):
        registry.rounds.reopen(2, ALL, 2)


def test_a_late_one_counts_in_the_next_round_if_it_may(registry: Registry) -> None:
    open_round(registry)
    for name in ("ann", "ben"):
        registry.submissions.add(delta_of(name))
    registry.rounds.close(1)
    registry.plug_ins.finish_round(1, [])
    open_round(registry)
    found = registry.submissions.add(delta_of("cas", 1), staleness=1)
    assert (found.round, found.tuned_round) == (2, 1)
    assert registry.rounds.part(2, "cas").state == "submitted"
    assert registry.submissions.of_tenant("cas") == [found]


def test_a_withdrawn_submission_makes_room_for_another(registry: Registry) -> None:
    number = open_round(registry, 1)
    first = registry.submissions.add(delta_of("ann", digest="a" * 64))
    assert registry.submissions.withdraw(first, "it does not fit").digest == "a" * 64
    part = registry.rounds.part(number, "ann")
    assert (part.state, part.reason, registry.submissions.of_round(number)) == ("failed", "it does not fit", [])
    second = registry.submissions.add(delta_of("ann", digest="b" * 64))
    registry.rounds.close(number)
    registry.plug_ins.finish_round(number, [])
    with pytest.raises(ConfigError, match="Round 1 is finished"):
        registry.submissions.withdraw(second, "so")
    assert [(one.round, one.tenant, one.reason) for one in registry.submissions.withdrawals()] == [
        (1, "ann", "it does not fit")
    ]


# Data owners


def test_who_may_send(registry: Registry) -> None:
    tenants = registry.tenants
    token = tenants.admit("ann", {"cpus": 2})
    tenants.authenticate("ann", token)
    again = tenants.admit("ann", {"cpus": 3})
    for name, sent, match in (
        ("ann", "0" * 32, "does not carry the token of ann"),
        ("ann", token, "does not carry the token of ann"),
        ("ann", None, "does not carry the token of ann"),
        ("ann", "\ud800", "does not carry the token of ann"),
        ("zoe", token, "'zoe' is no data owner"),
        ("\ud800", token, "is no data owner"),
        (7, token, "whoever sends without a name is no data owner"),
        (
            "zoe\nINFO tenant=ann submitted" + 9999 * "x",
            token,
            r"'zoe\\nINFO tenant=ann submittedx+\.\.\.' is no data owner",
        ),
    ):
        with pytest.raises(UnknownSender, match=match) as refused:
            tenants.authenticate(name, sent)  # type: ignore[arg-type]
        assert len(refused.value.problem) < 150
    tenants.set_state("ann", "paused")
    tenants.authenticate("ann", again)
    tenants.check_active("ann")  # what it has tuned already may come
    tenants.set_state("ann", "revoked", "left the consortium")
    with pytest.raises(ArtifactRefused, match="ann was revoked"):
        tenants.check_active("ann")
    assert token.encode() not in (registry._database.path).read_bytes()


def test_revoked_is_final(registry: Registry) -> None:
    registry.tenants.set_state("ann", "cancelled", "took too long")
    with pytest.raises(ConfigError, match="ann was cancelled, which is final"):
        registry.tenants.set_state("ann", "admitted")
    registry.tenants.set_state("ann", "revoked", "asked to")
    with pytest.raises(ConfigError, match=r"tenants: ann was revoked \(asked to\)"):
        registry.tenants.admit("ann", {})
    with pytest.raises(ConfigError, match="no data owner can be called 'aggregate'"):
        registry.tenants.admit(AGGREGATE, {})
    with pytest.raises(ConfigError, match="There is no data owner 'zoe'") as missing:
        registry.tenants.set_state("zoe", "paused")
    assert "ann, ben, cas" in missing.value.remedy


def test_ten_thousand_refusals_take_no_room(registry: Registry) -> None:
    for number in range(100):
        registry.tenants.refuse("ann", f"tensor {number} is extra")
        registry.tenants.refuse(None, f"'stranger{number}' is no data owner")
    for sender in ("ann", None):
        kept = registry.tenants.refusals(sender)
        assert len(kept) == REFUSALS_KEPT + 1
        assert sum(count for _, count in kept) == 100
        assert kept[0] == ("(others)", 100 - REFUSALS_KEPT)
    assert len(registry._database.rows("SELECT DISTINCT tenant FROM refusals")) == 2
    assert registry.tenants.refuse("ben", "y" * 10_000, count=9) == 9
    assert [(len(reason), count) for reason, count in registry.tenants.refusals("ben")] == [(500, 9)]


# Plug-ins


def test_a_round_ends_with_its_results(registry: Registry) -> None:
    clock = Clock()
    registry._clock = clock
    number = whole_round(registry)
    assert registry.rounds.get(number).state == "finished"
    aggregate = registry.plug_ins.in_force(AGGREGATE)
    assert aggregate is not None
    assert (aggregate.version, aggregate.digest, aggregate.settings) == (1, "aggregate-1", {"method": "mean"})
    assert [one.tenant for one in registry.plug_ins.made_from(aggregate)] == ALL
    own = registry.plug_ins.in_force("ben")
    assert own is not None
    assert [one.tenant for one in registry.plug_ins.made_from(own)] == ["ben"]
    # A coordinator that died just after it had written this does it once more.
    before = registry.plug_ins.all()
    registry.plug_ins.finish_round(number, [result(registry, name, number) for name in [*ALL, AGGREGATE]])
    assert registry.plug_ins.all() == before
    with pytest.raises(ConfigError, match="Round 1 has another plug-in of ann already"):
        registry.plug_ins.finish_round(number, [result(registry, "ann", number, "something else")])
    assert registry.plug_ins.all() == before


def test_only_a_closed_round_has_results(registry: Registry) -> None:
    number = open_round(registry)
    with pytest.raises(ConfigError, match="Round 1 is open"):
        registry.plug_ins.finish_round(number, [])
    registry.rounds.close(number)
    with pytest.raises(ConfigError, match="Round 1 is failed"):
        registry.plug_ins.finish_round(number, [])


def test_the_latest_round_is_in_force(registry: Registry) -> None:
    whole_round(registry)
    whole_round(registry, ["ann", "cas"])
    in_force = {name: registry.plug_ins.in_force(name) for name in [*ALL, AGGREGATE]}
    assert {name: found and found.round for name, found in in_force.items()} == {
        "ann": 2,
        "ben": 1,
        "cas": 2,
        AGGREGATE: 2,
    }
    assert registry.plug_ins.in_force("zoe") is None


def test_what_a_revoked_one_was_in_is_found_and_replaced(registry: Registry) -> None:
    whole_round(registry)
    whole_round(registry, ["ann", "cas"])
    assert [(one.name, one.round) for one in registry.plug_ins.containing("ben")] == [(AGGREGATE, 1), ("ben", 1)]
    registry.plug_ins.revoke("ben", 1, "ben left")
    rebuilt = registry.plug_ins.replace(1, result(registry, AGGREGATE, 1, "rebuilt", without="ben"), "ben left")
    assert (rebuilt.version, rebuilt.digest) == (3, "rebuilt")
    assert registry.plug_ins.containing("ben") == []
    assert registry.plug_ins.in_force("ben") is None
    versions = [(one.version, one.round, one.state, one.reason) for one in registry.plug_ins.of(AGGREGATE)]
    assert versions == [(1, 1, "revoked", "ben left"), (2, 2, "active", None), (3, 1, "active", None)]
    current = registry.plug_ins.in_force(AGGREGATE)
    assert current is not None
    assert current.round == 2
