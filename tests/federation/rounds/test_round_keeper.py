"""Rounds without Ray: what is let in, what counts, what becomes of it, and that all of it survives a restart."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from scaleot_ray.artifacts.artifact import Artifact
from scaleot_ray.config import AggregationSettings, RoundSettings
from scaleot_ray.errors import ArtifactRefused, ConfigError, RunFailed
from scaleot_ray.federation.rounds.registry import AGGREGATE
from tests.federation.rounds.keeper_bench import NAMES, Bench
from tests.federation.rounds.tiny_deltas import TinyDeltas


def test_each_data_owner_has_its_own_plug_in(bench: Bench) -> None:
    number = bench.begin()
    for value, name in enumerate(NAMES, start=1):
        bench.send(name, number, float(value))
    assert bench.keeper.end(number).state == "finished"
    assert [bench.value(name) for name in NAMES] == [1.0, 2.0, 3.0]
    assert bench.keeper.registry.plug_ins.in_force(AGGREGATE) is None


def test_a_round_begins_with_the_aggregate_of_the_one_before(bench: Bench) -> None:
    bench.new(
        rounds=RoundSettings(count=2), aggregation=AggregationSettings(), weights={"ann": 3.0, "ben": 1.0, "cas": 0.0}
    )
    number = bench.begin()
    assert bench.keeper.start(number, "ann") is None
    for name, value in zip(NAMES, (1.0, 5.0, 100.0), strict=True):
        bench.send(name, number, value)
    bench.keeper.end(number)
    assert bench.value(AGGREGATE) == 2.0
    second = bench.begin()
    start = bench.keeper.start(second, "ann")
    assert start is not None
    assert {float(tensor.mean()) for tensor in start.tensors.values()} == {2.0}
    with pytest.raises(ArtifactRefused, match="tuning began with the emulator as it is, this round begins with delta"):
        bench.send("ann", second, 4.0, start=None)
    for name, value in zip(NAMES, (4.0, 2.0, 0.0), strict=True):
        bench.send(name, second, value)
    bench.keeper.end(second)
    assert bench.value(AGGREGATE) == 3.5  # 2 + (3 · 2 + 1 · 0) / 4
    assert bench.value("ben") == 2.0
    assert bench.keeper.begin(NAMES) is None  # both rounds are done
    bench.new(rounds=RoundSettings(count=3))
    assert bench.begin() == 3


def test_a_late_delta_counts_by_how_far_it_has_come(bench: Bench) -> None:
    bench.new(rounds=RoundSettings(count=2, quorum=2, staleness=1), aggregation=AggregationSettings())
    first = bench.begin()
    bench.send("ann", first, 1.0)
    bench.send("ben", first, 3.0)
    assert bench.keeper.end(first).state == "finished"
    second = bench.begin()
    found = bench.send("cas", first, 6.0)  # begun with the emulator as it is: 6 further
    assert (found.round, found.tuned_round) == (second, first)
    bench.send("ann", second, 2.0)
    bench.send("ben", second, 2.0)
    bench.keeper.end(second)
    assert bench.value(AGGREGATE) == 4.0  # 2 + (0 + 0 + 6) / 3


def test_what_comes_between_two_rounds_is_sent_again_and_counts_in_the_next(bench: Bench) -> None:
    bench.new(rounds=RoundSettings(count=2, quorum=2, staleness=1), aggregation=AggregationSettings())
    first = bench.begin()
    in_time = bench.send("ann", first, 1.0)
    bench.send("ben", first, 3.0)
    sent = bench.sent("cas", first, 6.0)
    for step in (lambda: bench.keeper.registry.rounds.close(first), lambda: bench.keeper.end(first), bench.new):
        step()  # while it is aggregated, after that, and with a new coordinator
        assert bench.keeper.take(sent) is None
        assert bench.send("ann", first, 1.0) == in_time  # only its acknowledgement was lost
    assert bench.keeper.registry.tenants.refusals("cas") == []
    assert "data owner cas" not in {line["sender"] for line in bench.audit.read()}
    token = bench.tokens["cas"]
    assert bench.keeper.begin(NAMES) is not None
    found = bench.send("cas", first, 6.0, token=token)
    assert (found.round, found.tuned_round) == (2, first)
    part = bench.keeper.registry.rounds.part(first, "cas")
    assert (part.state, part.reason) == ("late", "counts in round 2")
    with pytest.raises(ArtifactRefused, match="does not carry the token"):
        bench.keeper.take(bench.sent("ben", 2, 6.0, token="guessed"))


@pytest.mark.parametrize(("count", "staleness", "state"), [(1, 1, "finished"), (2, 0, "finished"), (2, 1, "failed")])
def test_what_no_round_will_take_is_not_waited_for(bench: Bench, count: int, staleness: int, state: str) -> None:
    rounds = RoundSettings(count=count, quorum=3 if state == "failed" else 2, staleness=staleness)
    bench.new(rounds=rounds, aggregation=AggregationSettings())
    first = bench.begin()
    bench.send("ann", first, 1.0)
    bench.send("ben", first, 3.0)
    assert bench.keeper.end(first).state == state
    with pytest.raises(ArtifactRefused, match="round 1 is closed"):
        bench.send("cas", first, 6.0)


@pytest.mark.parametrize("method", ["mean", "median"])
def test_who_has_weight_0_stays_out_of_the_aggregate(bench: Bench, method: str) -> None:
    bench.new(aggregation=AggregationSettings(method=method), weights={"cas": 0.0})
    number = bench.begin()
    for name, value in zip(NAMES, (1.0, 3.0, 9.0), strict=True):
        bench.send(name, number, value)
    bench.keeper.end(number)
    assert (bench.value(AGGREGATE), bench.value("cas")) == (2.0, 9.0)
    made = bench.keeper.in_common()
    assert made is not None
    assert [one.tenant for one in bench.keeper.registry.plug_ins.made_from(made)] == ["ann", "ben"]
    assert bench.keeper.revoke("cas", "left") == []


def test_where_nobody_has_a_weight_the_round_goes_on_in_the_next_run(bench: Bench) -> None:
    bench.new(aggregation=AggregationSettings(), rounds=RoundSettings(quorum=1), weights={"ann": 0.0})
    number = bench.begin()
    bench.send("ann", number, 1.0)
    with pytest.raises(ConfigError, match="no delta of round 1 has a weight above 0"):
        bench.keeper.end(number)
    assert bench.keeper.registry.rounds.get(number).state == "failed"
    bench.new(weights={"ann": 2.0})  # those of the run that goes on count
    assert bench.begin() == number
    assert bench.keeper.end(number).state == "finished"
    assert bench.value(AGGREGATE) == 1.0


def test_momentum_goes_on_from_round_to_round(bench: Bench) -> None:
    how = AggregationSettings(server="momentum", server_momentum=0.5)
    bench.new(rounds=RoundSettings(count=2), aggregation=how)
    for value in (1.0, 2.0):
        number = bench.begin(["ann"])
        bench.send("ann", number, value)
        bench.keeper.end(number)
        bench.new()
    assert bench.value(AGGREGATE) == 2.5  # 1, then 1 more and half of the first once more


@pytest.mark.parametrize("between", ["a round that was revoked", "a run without an aggregate"])
def test_momentum_goes_on_over_a_round_without_an_aggregate(bench: Bench, between: str) -> None:
    how = AggregationSettings(server="momentum", server_momentum=0.5)
    bench.new(rounds=RoundSettings(count=3, quorum=1), aggregation=how)
    bench.send("ann", bench.begin(["ann"]), 1.0)
    bench.keeper.end(1)
    revoked = between == "a round that was revoked"
    bench.new(aggregation=how if revoked else None)
    bench.send("ben", bench.begin(["ben"]), 9.0)
    bench.keeper.end(2)
    if revoked:
        assert bench.keeper.revoke("ben", "left") == [2]
    bench.new(aggregation=how)
    bench.send("ann", bench.begin(["ann"]), 2.0)
    bench.keeper.end(3)
    assert bench.value(AGGREGATE) == 2.5  # 1, then 1 more and half of the first once more


def test_nothing_is_lost_with_the_keeper(bench: Bench) -> None:
    bench.new(rounds=RoundSettings(count=2), aggregation=AggregationSettings())
    number = bench.begin()
    first = bench.send("ann", number, 1.0)
    old = bench.keeper
    bench.new()
    assert bench.send("ann", number, 1.0) == first  # not counted twice
    with pytest.raises(RunFailed, match="another coordinator has taken this run over"):
        old.leave_out(number, "ben", "too slow")
    assert bench.begin() == number
    assert bench.keeper.taking_part(number) == {"ann": True, "ben": False, "cas": False}
    for name in ("ben", "cas"):
        bench.send(name, number, 4.0)
    bench.keeper.registry.rounds.close(number)
    bench.new()  # in the middle of aggregation
    assert bench.begin() == 2
    assert bench.value(AGGREGATE) == 3.0


def test_a_round_below_its_quorum_fails_and_goes_on_in_the_next_run(bench: Bench) -> None:
    bench.new(rounds=RoundSettings(quorum=2), aggregation=AggregationSettings())
    number = bench.begin()
    bench.send("ann", number, 1.0)
    bench.keeper.leave_out(number, "ben", "its process was killed")
    ended = bench.keeper.end(number)
    assert (ended.state, bench.keeper.registry.plug_ins.all()) == ("failed", [])
    assert ended.reason is not None
    assert "ben: its process was killed; cas: submitted nothing in time" in ended.reason
    assert bench.begin() == number
    bench.send("ben", number, 3.0)
    assert bench.keeper.end(number).state == "finished"
    assert bench.value(AGGREGATE) == 2.0


def test_without_an_aggregate_every_run_has_a_round_of_its_own(bench: Bench) -> None:
    first = bench.begin()
    bench.send("ann", first, 1.0)
    second = bench.begin()  # the run that began the first was killed
    assert (first, second) == (1, 2)
    again = bench.send("ann", second, 1.0)
    assert (again.round, again.tuned_round) == (2, 2)
    assert bench.keeper.registry.rounds.get(1).reason == "the run that began it ended before it did"


def test_cancelled_data_owners_take_no_part(bench: Bench) -> None:
    bench.begin()
    bench.keeper.registry.tenants.set_state("ben", "cancelled", "took too long")
    bench.keeper.registry.tenants.set_state("cas", "paused")
    assert bench.keeper.admit("ben", {}) is None
    found = bench.keeper.begin(NAMES)
    assert found is not None
    assert (list(bench.keeper.taking_part(found.number)), found.quorum) == (["ann"], 1)
    bench.keeper.registry.tenants.set_state("ann", "revoked")
    with pytest.raises(ConfigError, match="1 submissions are asked for, of 0 data owners"):
        bench.keeper.begin(NAMES)


def test_a_revoked_data_owner_is_taken_out_of_everything(bench: Bench) -> None:
    bench.new(rounds=RoundSettings(count=3), aggregation=AggregationSettings())
    values = {"ann": (1.0, 4.0), "ben": (2.0, 2.0), "cas": (9.0, 9.0)}
    for turn in (0, 1):
        number = bench.begin()
        for name in NAMES:
            bench.send(name, number, values[name][turn])
        bench.keeper.end(number)
    assert bench.value(AGGREGATE) == 5.0
    third = bench.begin()
    bench.send("cas", third, 7.0)
    bench.send("ann", third, 6.0)
    bench.send("ben", third, 5.0)
    before = {path.name for path in bench.folder.glob("c/*/deltas/*")}
    assert bench.keeper.revoke("cas", "asked to") == [1, 2]
    # Round 1: (1 + 2) / 2 = 1.5. Round 2 began with 4: (0 - 2) / 2 = -1 from there, so 0.5.
    assert bench.value(AGGREGATE) == 0.5
    registry = bench.keeper.registry
    versions = [(one.round, one.state) for one in registry.plug_ins.of(AGGREGATE)]
    assert versions == [(1, "revoked"), (2, "revoked"), (1, "active"), (2, "active")]
    assert registry.plug_ins.in_force("cas") is None
    assert registry.plug_ins.of("cas")[0].reason == "cas was revoked: asked to"
    gone = before - {path.name for path in bench.folder.glob("c/*/deltas/*")}
    assert gone == {one.digest for one in registry.submissions.of_tenant("cas")}
    with pytest.raises(ArtifactRefused, match="cas was revoked"):
        bench.send("cas", third, 7.0)
    assert bench.keeper.end(third).state == "failed"  # its quorum was all three
    bench.new(rounds=RoundSettings(count=3, quorum=2))
    assert bench.keeper.revoke("cas", "once more") == []
    assert bench.value("ann") == 4.0


def two_rounds(bench: Bench) -> None:
    """Two rounds of three data owners on top of one another; a third may follow."""
    bench.new(rounds=RoundSettings(count=3, quorum=1), aggregation=AggregationSettings())
    for values in ((1.0, 2.0, 9.0), (4.0, 2.0, 9.0)):
        number = bench.begin()
        for name, value in zip(NAMES, values, strict=True):
            bench.send(name, number, value)
        bench.keeper.end(number)


@pytest.mark.parametrize("further", [0, 1, 2], ids=["the state", "the aggregates", "the plug-ins"])
def test_a_revocation_that_was_cut_short_is_finished_before_the_next_round(bench: Bench, further: int) -> None:
    two_rounds(bench)
    registry = bench.keeper.registry
    registry.tenants.set_state("cas", "revoked", "asked to")  # what is on the disk first; then everything died
    if further:
        bench.keeper._aggregates.withdraw({"cas": "cas was revoked: asked to"})
    if further > 1:
        for turn in (1, 2):
            registry.plug_ins.revoke("cas", turn, "cas was revoked: asked to")
    assert bench.new().made_anew == ([] if further else [1, 2])
    registry = bench.keeper.registry
    assert bench.value(AGGREGATE) == 0.5  # as if nothing had come between
    assert bench.begin(["ann", "ben"]) == 3
    start = bench.keeper.start(3, "ann")
    assert start is not None
    assert registry.rounds.get(3).start == start.digest == registry.plug_ins.in_force(AGGREGATE).digest  # type: ignore[union-attr]
    assert registry.plug_ins.containing("cas") == []
    kept = {path.name for path in bench.folder.glob("c/*/deltas/*")}
    assert not kept & {one.digest for one in registry.submissions.of_tenant("cas")}
    assert bench.keeper.finish_revocations() == []


def test_no_round_begins_while_a_revocation_cannot_be_finished(bench: Bench) -> None:
    two_rounds(bench)
    (lost,) = (one.digest for one in bench.keeper.registry.submissions.of_round(2) if one.tenant == "ben")
    (place,) = bench.folder.glob(f"c/*/deltas/{lost}")
    place.rename(bench.folder / "lost")
    for attempt in (lambda: bench.keeper.revoke("cas", "left"), lambda: bench.new().begin(["ann", "ben"])):
        with pytest.raises(ArtifactRefused, match=lost):
            attempt()
    (bench.folder / "lost").rename(place)
    assert bench.begin(["ann", "ben"]) == 3
    assert bench.value(AGGREGATE) == 0.5


def test_a_failed_round_goes_on_with_those_who_take_part_now(bench: Bench) -> None:
    bench.new(rounds=RoundSettings(quorum=3), aggregation=AggregationSettings())
    number = bench.begin()
    bench.send("ann", number, 1.0)
    bench.send("ben", number, 3.0)
    assert bench.keeper.end(number).state == "failed"
    bench.keeper.set_state("cas", "cancelled", "took too long")
    bench.new(rounds=RoundSettings(quorum=2))
    assert bench.keeper.begin(NAMES) is not None
    assert bench.keeper.taking_part(number) == {"ann": True, "ben": True}
    bench.keeper.revoke("ben", "left")
    assert bench.keeper.taking_part(number) == {"ann": True}
    assert (bench.keeper.submitted("ann") is not None, bench.keeper.submitted("ben")) == (True, None)
    assert bench.keeper.end(number).state == "failed"
    bench.new(rounds=RoundSettings())
    assert bench.keeper.begin(["ann"]) is not None
    assert bench.keeper.end(number).state == "finished"


def test_what_a_failed_round_began_with_outlives_a_revocation(bench: Bench) -> None:
    bench.new(rounds=RoundSettings(count=2, quorum=2), aggregation=AggregationSettings())
    first = bench.begin()
    for name, value in zip(NAMES, (1.0, 3.0, 8.0), strict=True):
        bench.send(name, first, value)
    bench.keeper.end(first)
    second = bench.begin()
    assert bench.keeper.end(second).state == "failed"
    bench.keeper.revoke("cas", "left")
    assert bench.value(AGGREGATE) == 2.0
    assert bench.begin(["ann", "ben"]) == second
    start = bench.keeper.start(second, "ann")
    assert start is not None  # 4, as it was: ann may have begun with it already
    bench.send("ann", second, 5.0)
    bench.send("ben", second, 4.0)
    bench.keeper.end(second)
    assert bench.value(AGGREGATE) == 2.5


def test_too_few_for_a_trimmed_mean_withdraw_the_aggregate(bench: Bench) -> None:
    bench.new(aggregation=AggregationSettings(method="trimmed_mean", trim=0.34))
    number = bench.begin()
    for name in NAMES:
        bench.send(name, number, 1.0)
    bench.keeper.end(number)
    assert bench.keeper.revoke("cas", "left") == [number]
    assert bench.keeper.in_common() is None
    assert bench.value("ann") == 1.0


def test_a_store_that_cannot_be_written_withdraws_no_aggregate(bench: Bench) -> None:
    bench.new(aggregation=AggregationSettings())
    number = bench.begin()
    for name, value in zip(NAMES, (1.0, 2.0, 6.0), strict=True):
        bench.send(name, number, value)
    (kept,) = bench.folder.glob("c/*/deltas")
    for value, attempt in ((3.0, lambda: bench.keeper.end(number)), (1.5, lambda: bench.keeper.revoke("cas", "left"))):
        made = kept / bench.tiny.delta(value).digest
        made.symlink_to(bench.folder / "audit.jsonl" / "delta")  # where nobody can write, whoever they are
        with pytest.raises(ConfigError, match=r"audit\.jsonl/delta: cannot be written"):
            attempt()
        assert bench.keeper.registry.rounds.get(number).state == ("closed" if value == 3.0 else "finished")
        bench.new()  # whoever would mend it gets here
        made.unlink()
        attempt()
        assert bench.value(AGGREGATE) == value


def test_a_revocation_removes_the_state_of_a_round_without_a_result(bench: Bench) -> None:
    how = AggregationSettings(server="momentum", server_learning_rate=2.0)
    bench.new(aggregation=how, rounds=RoundSettings(quorum=1))
    bench.send("ann", bench.begin(["ann"]), 1.0)
    (kept,) = bench.folder.glob("c/*/deltas")
    made = kept / bench.tiny.delta(2.0).digest
    made.symlink_to(bench.folder / "audit.jsonl" / "delta")
    with pytest.raises(ConfigError, match="cannot be written"):
        bench.keeper.end(1)
    made.unlink()
    assert list(bench.folder.glob("c/*/server/*"))  # it is what ann sent
    bench.keeper.revoke("ann", "left")
    assert not list(bench.folder.glob("c/*/server/*"))
    assert bench.keeper.end(1).state == "failed"


def test_rounds_without_an_aggregate_are_no_rounds_of_one(bench: Bench) -> None:
    number = bench.begin(["ann"])
    bench.send("ann", number, 1.0)
    bench.keeper.end(number)
    assert bench.keeper.is_last(number)
    bench.new(rounds=RoundSettings(count=2), aggregation=AggregationSettings())
    for turn, last in enumerate((False, True), start=2):
        number = bench.begin(["ann"])
        assert (number, bench.keeper.is_last(number)) == (turn, last)
        bench.send("ann", number, 1.0)
        bench.keeper.end(number)
    assert bench.value(AGGREGATE) == 1.0
    assert bench.keeper.begin(["ann"]) is None


@pytest.mark.parametrize("count", [1, 2])
def test_what_a_run_without_an_aggregate_left_is_no_round_of_one(bench: Bench, count: int) -> None:
    with_aggregate = {"rounds": RoundSettings(count=count), "aggregation": AggregationSettings()}
    bench.new(**with_aggregate)
    bench.send("ann", bench.begin(["ann"]), 3.0)
    bench.keeper.end(1)
    bench.new(aggregation=None)
    bench.send("ann", bench.begin(["ann"]), 1.0)  # and it was killed
    bench.new(**with_aggregate)
    bench.keeper.admit("ann", {})
    found = bench.keeper.begin(["ann"])
    left = bench.keeper.registry.rounds.get(2)
    assert (left.state, left.reason) == ("failed", "a run without aggregation began it, and ended before it did")
    if count == 1:
        assert found is None
        return
    assert found is not None
    assert (found.number, found.start) == (3, bench.keeper.in_common().digest)  # type: ignore[union-attr]
    bench.new(**with_aggregate)
    assert bench.begin(["ann"]) == 3  # that one goes on
    bench.send("ann", 3, 5.0)
    bench.keeper.end(3)
    assert bench.value(AGGREGATE) == 5.0
    assert bench.keeper.begin(["ann"]) is None


def test_a_delta_that_counted_before_max_norm_stays(bench: Bench) -> None:
    bench.send("ann", bench.begin(["ann"]), 1.0)
    bench.keeper.end(1)
    bench.new(rounds=RoundSettings(max_norm=0.5))
    with pytest.raises(ArtifactRefused, match="above rounds"):
        bench.send("ann", bench.begin(["ann"]), 1.0)
    assert bench.value("ann") == 1.0


def test_without_anyone_left_an_aggregate_is_withdrawn(bench: Bench) -> None:
    bench.new(aggregation=AggregationSettings())
    number = bench.begin(["ann"])
    bench.send("ann", number, 1.0)
    bench.keeper.end(number)
    bench.keeper.revoke("ann", "")
    assert bench.keeper.registry.plug_ins.in_force(AGGREGATE) is None
    assert not list(bench.folder.glob("c/*/deltas/*"))


def _nan(tiny: TinyDeltas) -> Artifact:
    delta = tiny.delta(1.0)
    next(iter(delta.tensors.values())).fill_(float("nan"))  # behind the manifest's back: none is made of NaN
    return delta


def _extra(tiny: TinyDeltas) -> Artifact:
    delta = tiny.delta(1.0)
    tensors = {**delta.tensors, "more": torch.ones(3)}
    return Artifact.made_from(tiny.emulator.manifest, "delta", delta.manifest.content, tensors)


def _misshapen(tiny: TinyDeltas) -> Artifact:
    delta = tiny.delta(1.0)
    name, tensor = next(iter(delta.tensors.items()))
    tensors = {**delta.tensors, name: torch.cat([tensor, tensor])}
    return Artifact.made_from(tiny.emulator.manifest, "delta", delta.manifest.content, tensors)


def _orphan(tiny: TinyDeltas) -> Artifact:
    delta = tiny.delta(1.0)
    return Artifact.create("delta", delta.manifest.content, delta.tensors, family="llama", parent_digest="0" * 64)


@pytest.mark.parametrize(
    ("make", "match"),
    [(_nan, "not finite"), (_extra, "'more'"), (_misshapen, "has shape"), (_orphan, "was tuned on emulator")],
)
def test_a_bad_submission_is_refused_by_name(bench: Bench, make: Any, match: str) -> None:
    number = bench.begin()
    with pytest.raises(ArtifactRefused, match=match) as caught:
        bench.send("ann", number, make(bench.tiny))
    assert caught.value.problem in [reason for reason, _ in bench.keeper.registry.tenants.refusals("ann")]
    assert [line["decision"] for line in bench.audit.read()] == ["refused"]
    bench.send("ben", number, 1.0)  # nobody else is affected
    assert bench.keeper.taking_part(number) == {"ann": False, "ben": True, "cas": False}


def test_too_long_a_delta_is_refused_and_not_kept(bench: Bench) -> None:
    bench.new(rounds=RoundSettings(max_norm=1.0))
    number = bench.begin()
    with pytest.raises(ArtifactRefused, match=r"norm is \d+\.?\d*, above rounds.max_norm=1"):
        bench.send("ann", number, 1.0)
    assert not list(bench.folder.glob("c/*/deltas/*"))
    bench.send("ann", number, 1e-4)
    lines = [(line["kind"], line["decision"], line["reason"] is not None) for line in bench.audit.read()]
    assert lines == [("delta", "refused", True), ("delta", "sent", False), ("metrics", "sent", False)]


def test_who_it_is_from_is_checked_before_anything_is_read(bench: Bench) -> None:
    number = bench.begin()

    def never() -> Artifact:
        raise AssertionError("was read")

    for changes, match in (
        ({"token": "0" * 32}, "does not carry the token of ann"),
        ({"tenant": "zoe"}, "'zoe' is no data owner"),
    ):
        with pytest.raises(ArtifactRefused, match=match):
            bench.send("ann", number, never, **changes)
    bench.send("ann", number, 1.0)
    bench.send("ben", number, 1.0)  # the same rows give the same delta
    bench.send("cas", number, 3.0)
    bench.keeper.end(number)
    with pytest.raises(ArtifactRefused, match="round 1 is closed"):
        bench.send("ann", number, 9.0)


def test_a_delta_of_an_earlier_round_is_no_delta_of_this_one(bench: Bench) -> None:
    bench.new(rounds=RoundSettings(count=2), aggregation=AggregationSettings())
    first = bench.begin()
    for name in NAMES:
        bench.send(name, first, 1.0)
    bench.keeper.end(first)
    second = bench.begin()
    with pytest.raises(ArtifactRefused, match="was submitted before in round 1"):
        bench.send("ann", second, 1.0, start=None)
    assert bench.send("ann", first, 1.0, start=None).round == first  # its acknowledgement was lost: it has counted
