"""Deltas that were not tuned as the run's settings say: refused when they come, and no longer counted when they do."""

from __future__ import annotations

from typing import Any

import pytest

from scaleot_ray.artifacts.artifact import Artifact
from scaleot_ray.config import AggregationSettings, RoundSettings, TuneSettings
from scaleot_ray.errors import ArtifactRefused, ConfigError
from scaleot_ray.federation.rounds.registry import AGGREGATE
from tests.federation.rounds.keeper_bench import NAMES, Bench
from tests.federation.rounds.tiny_deltas import TinyDeltas

LORA = {name: TuneSettings(method="lora", lora_rank=2, lora_alpha=2.0) for name in NAMES}
MORE = {name: TuneSettings(method="lora", lora_rank=4, lora_alpha=2.0) for name in NAMES}


def _half(tiny: TinyDeltas) -> Artifact:
    delta = tiny.low_rank(0.5)
    tensors = {name: tensor.half() for name, tensor in delta.tensors.items()}
    return Artifact.made_from(tiny.emulator.manifest, "delta", delta.manifest.content, tensors)


def _huge(tiny: TinyDeltas) -> Artifact:
    delta = tiny.low_rank(0.5)
    next(iter(delta.tensors.values())).view(-1)[0] = -3e38
    return Artifact.made_from(tiny.emulator.manifest, "delta", delta.manifest.content, delta.tensors)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda tiny: tiny.delta(1.0), r"tuned with method layers, and this run has tune\.method=lora"),
        (lambda tiny: tiny.low_rank(0.5, rank=4), r"tuned with rank 4, and this run has tune\.lora_rank=2"),
        (
            lambda tiny: tiny.low_rank(0.5, alpha=1e300),
            r"tuned with alpha 1e\+300, and this run has tune\.lora_alpha=2",
        ),
        (_half, "has type float16; on this emulator it is float32"),
        (_huge, "has a value of size 3e"),
    ],
    ids=["method", "rank", "alpha", "type", "size"],
)
@pytest.mark.parametrize("aggregation", [AggregationSettings(), None], ids=["aggregate", "own plug-ins"])
def test_what_does_not_fit_is_refused_by_name_and_hinders_nobody(
    bench: Bench, make: Any, match: str, aggregation: AggregationSettings | None
) -> None:
    bench.new(aggregation=aggregation, rounds=RoundSettings(quorum=2), tunes=LORA)
    number = bench.begin()
    with pytest.raises(ArtifactRefused, match=match) as caught:
        bench.send("ann", number, make(bench.tiny))
    assert caught.value.problem in [reason for reason, _ in bench.keeper.registry.tenants.refusals("ann")]
    assert [(line["kind"], line["decision"]) for line in bench.audit.read()] == [("delta", "refused")]
    assert not list(bench.folder.glob("c/*/deltas/*"))
    for name in ("ben", "cas"):
        bench.send(name, number, bench.tiny.low_rank(0.5))
    assert bench.keeper.end(number).state == "finished"


def test_a_later_round_refuses_another_method_as_the_first_does(bench: Bench) -> None:
    bench.new(aggregation=AggregationSettings(method="svd"), tunes=LORA, rounds=RoundSettings(count=2, quorum=1))
    first = bench.begin()
    bench.send("ann", first, bench.tiny.low_rank(0.5))
    bench.keeper.end(first)
    second, said = bench.begin(), len(bench.audit.read())
    start = bench.keeper.registry.rounds.get(second).start
    with pytest.raises(ArtifactRefused, match="tuned with method layers"):
        bench.send("ann", second, bench.tiny.delta(1.0, start))
    assert [line["decision"] for line in bench.audit.read()[said:]] == ["refused"]
    bench.send("ann", second, bench.tiny.low_rank(0.25, start=start))
    assert bench.keeper.end(second).state == "finished"


def test_each_data_owner_may_have_a_rank_of_its_own(bench: Bench) -> None:
    bench.new(aggregation=AggregationSettings(method="concat"), tunes={**LORA, "ben": MORE["ben"]})
    number = bench.begin(["ann", "ben"])
    with pytest.raises(ArtifactRefused, match=r"tuned with rank 2, and this run has tune\.lora_rank=4"):
        bench.send("ben", number, bench.tiny.low_rank(0.5))
    bench.send("ann", number, bench.tiny.low_rank(0.5))
    bench.send("ben", number, bench.tiny.low_rank(0.5, rank=4))
    assert bench.keeper.end(number).state == "finished"
    made = bench.keeper.in_common()
    assert made is not None
    content = bench.keeper.delta(made.digest, "someone").manifest.content
    assert content.settings["rank"] == 6  # type: ignore[union-attr]


def test_with_other_settings_the_deltas_of_an_open_round_do_not_count_any_more(bench: Bench) -> None:
    bench.new(aggregation=AggregationSettings(), tunes={**LORA, "cas": MORE["cas"]})
    number = bench.begin()
    digests = [bench.send(name, number, bench.tiny.low_rank(0.5)).digest for name in ("ann", "ben")]
    bench.send("cas", number, bench.tiny.low_rank(0.5, rank=4))
    bench.keeper.leave_out(number, "cas", "too slow")
    bench.new(tunes=MORE)  # the run was stopped, and tune.lora_rank changed
    reason = "its delta does not count any more: it was tuned with rank 2, and this run has tune.lora_rank=4"
    assert bench.begin() == number
    assert bench.keeper.taking_part(number) == {"ann": False, "ben": False, "cas": True}
    found = bench.keeper.registry.submissions.withdrawals()
    assert [(one.tenant, one.reason) for one in found] == [("ann", reason), ("ben", reason)]
    assert bench.keeper.registry.rounds.part(number, "ann").reason == reason
    assert not {path.name for path in bench.folder.glob("c/*/deltas/*")} & set(digests)
    assert bench.keeper.withdraw_misfits() == []
    for name in ("ann", "ben"):
        bench.send(name, number, bench.tiny.low_rank(0.5, rank=4))
    assert bench.keeper.end(number).state == "finished"
    assert bench.value(AGGREGATE) == 0.5


def test_a_round_that_closed_with_what_does_not_belong_together_opens_again(bench: Bench) -> None:
    bench.new(aggregation=AggregationSettings(), tunes={**LORA, "cas": MORE["cas"]})
    number = bench.begin()
    for name in ("ann", "ben"):
        bench.send(name, number, bench.tiny.low_rank(0.5))
    bench.send("cas", number, bench.tiny.low_rank(0.5, rank=4))
    bench.keeper.registry.rounds.close(number)  # so an earlier version left it, and no run could go on
    bench.new(tunes=LORA)
    assert bench.begin() == number
    assert bench.keeper.taking_part(number) == {"ann": True, "ben": True, "cas": False}
    bench.send("cas", number, bench.tiny.low_rank(0.5))
    assert bench.keeper.end(number).state == "finished"


def test_what_an_aggregate_cannot_be_made_of_leaves_the_round_to_the_next_run(bench: Bench) -> None:
    bench.new(aggregation=AggregationSettings(method="trimmed_mean", trim=0.1))
    number = bench.begin()
    for name in NAMES:
        bench.send(name, number, 1.0)
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"0\.1 of 3 deltas is less than one"):
            bench.keeper.end(number)
        found = bench.keeper.registry.rounds.get(number)
        assert (found.state, "is less than one" in (found.reason or "")) == ("failed", True)
        assert bench.begin() == number
    bench.new(aggregation=AggregationSettings(method="median"))
    assert bench.begin() == number
    assert bench.keeper.end(number).state == "finished"


def test_a_round_does_not_begin_with_an_aggregate_of_other_settings(bench: Bench) -> None:
    bench.new(aggregation=AggregationSettings(method="svd"), tunes=LORA, rounds=RoundSettings(count=2))
    number = bench.begin(["ann"])
    bench.send("ann", number, bench.tiny.low_rank(0.5))
    bench.keeper.end(number)
    bench.new(tunes=MORE)
    with pytest.raises(ConfigError, match=r"ann cannot go on with: it was tuned with rank 2, .*tune\.lora_rank=4"):
        bench.begin(["ann"])
    bench.new(tunes=LORA)
    assert bench.begin(["ann"]) == 2


def test_a_data_owner_that_left_the_settings_still_counts_if_it_fits(bench: Bench) -> None:
    bench.new(aggregation=AggregationSettings(), tunes=LORA)
    number = bench.begin()
    bench.send("cas", number, bench.tiny.low_rank(0.5))
    bench.new(tunes={name: LORA[name] for name in ("ann", "ben")})
    assert bench.begin(["ann", "ben"]) == number
    assert bench.keeper.taking_part(number) == {"ann": False, "ben": False, "cas": True}


def test_what_a_submission_was_made_with_is_on_record(bench: Bench) -> None:
    bench.new(tunes=LORA)
    number = bench.begin(["ann"])
    sent = bench.send("ann", number, delta := bench.tiny.low_rank(0.5), data_digest="ab" * 32)
    bench.keeper.end(number)
    (found,) = bench.keeper.registry.submissions.of_tenant("ann")
    assert found == sent
    assert (found.settings["method"], found.settings["rank"], found.settings["alpha"]) == ("lora", 2, 2.0)
    assert found.settings["tune"]["steps"] == LORA["ann"].steps
    assert (found.code_version, found.data_digest) == (delta.manifest.library_version, "ab" * 32)
    own = bench.keeper.registry.plug_ins.in_force("ann")
    assert own is not None
    assert own.settings == found.settings
