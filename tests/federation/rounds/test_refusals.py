"""What is refused, however often and from whomever: on record, bounded, and at nobody else's cost."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from scaleot_ray.artifacts.audit import UNKNOWN_SENDER
from scaleot_ray.errors import ArtifactRefused
from scaleot_ray.federation.roles.object_store import from_shared, to_shared
from scaleot_ray.federation.rounds.refusals import REFUSALS_READ, WRITTEN_EVERY, NotRead
from scaleot_ray.federation.rounds.registry import UnknownSender
from tests.federation.rounds.keeper_bench import Bench

MANY = 10_000


SENDERS: dict[str, Callable[[int], dict[str, Any]]] = {
    "a data owner itself": lambda _: {},
    "a stranger in its name": lambda _: {"token": "0" * 32},
    "a new stranger each time": lambda number: {"tenant": f"stranger{number}"},
    "a stranger in everybody's name": lambda number: {"tenant": ("ann", "ben", "cas")[number % 3], "token": "guess"},
}


@pytest.mark.parametrize("who", SENDERS)
def test_ten_thousand_bad_ones_in_a_row_cost_nobody_anything(bench: Bench, who: str) -> None:
    number = bench.begin()
    metrics = bench.tiny.metrics()
    loud = 0
    for turn in range(MANY):
        with pytest.raises(ArtifactRefused) as refused:
            bench.send("ann", number, metrics, **SENDERS[who](turn))
        loud += not isinstance(refused.value, NotRead)
    assert loud == len(bench.audit.read()) == REFUSALS_READ + 1  # the last one says that no more are looked at
    sender = "ann" if who == "a data owner itself" else None
    party = "data owner ann" if sender else UNKNOWN_SENDER
    assert {line["sender"] for line in bench.audit.read()} == {party}
    assert "no more of them are looked at" in bench.audit.read()[-1]["reason"]
    tenants = bench.keeper.registry.tenants
    assert MANY - WRITTEN_EVERY < sum(count for _, count in tenants.refusals(sender)) <= MANY
    assert len(tenants.refusals(sender)) < 25
    for name in ("ben", "cas", *(() if sender else ("ann",))):
        assert tenants.refusals(name) == []
        bench.send(name, number, 1.0)
    bench.keeper.end(number)
    assert sum(count for _, count in tenants.refusals(sender)) == MANY


def test_whoever_cannot_show_who_it_is_does_not_count_against_that_name(bench: Bench) -> None:
    number = bench.begin()
    for _ in range(REFUSALS_READ + 5):
        with pytest.raises(ArtifactRefused, match=r"does not carry the token of ann|no more of them"):
            bench.send("ann", number, 1.0, token="guessed")
    assert bench.send("ann", number, 1.0).tenant == "ann"
    with pytest.raises(UnknownSender):  # and a new coordinator looks again
        bench.new().take(bench.sent("ann", number, 1.0, token="guessed"))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"round": "1"}, "is no number of a round"),
        ({"round": 1 << 80}, "is no number of a round"),
        ({"round": True}, "is no number of a round"),
        ({"round": None}, "is no number of a round"),
        ({"data_digest": "ab"}, "64 hexadecimal digits"),
        ({"data_digest": "Alice lives at 12 Main Street".ljust(64)}, "64 hexadecimal digits"),
        ({"data_digest": b"ab" * 32}, "64 hexadecimal digits"),
    ],
)
def test_what_no_tuning_sends_is_refused(bench: Bench, changes: dict[str, Any], match: str) -> None:
    number = bench.begin()
    sent = bench.sent("ann", number, 1.0, **changes)
    with pytest.raises(ArtifactRefused, match=match) as refused:
        bench.keeper.take(sent)
    assert bench.keeper.registry.tenants.refusals("ann") == [(refused.value.problem, 1)]
    assert [line["decision"] for line in bench.audit.read()] == ["refused"]
    bench.send("ann", number, 1.0)


def _malformed(good: dict[str, Any]) -> list[Any]:
    name, array = next(iter(good["tensors"].items()))
    without = {key: value for key, value in good.items() if key != "files"}
    return [
        None,
        b"",
        [],
        {},
        without,
        {**good, "more": b""},
        {**good, "manifest": "text"},
        {**good, "manifest": None},
        {**good, "tensors": None},
        {**good, "tensors": [array]},
        {**good, "tensors": {**good["tensors"], 7: array}},
        {**good, "tensors": {**good["tensors"], name: None}},
        {**good, "tensors": {**good["tensors"], name: bytes(array)}},
        {**good, "tensors": {**good["tensors"], name: array.view(np.int8)}},
        {**good, "tensors": {**good["tensors"], name: array.reshape(2, -1)}},
        {**good, "tensors": {**good["tensors"], name: np.repeat(array, 2)[::2]}},
        {**good, "tensors": {**good["tensors"], name: np.array([object()])}},
        {**good, "files": {"README.md": 7}},
        {**good, "files": {7: b""}},
    ]


def _edited(shared: Any, *path: str, value: Any) -> Any:
    """What :func:`to_shared` gave, with one value of the manifest replaced."""
    values = json.loads(shared["manifest"])
    place = values
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return {**shared, "manifest": json.dumps(values).encode()}


def test_numbers_that_nothing_can_count_are_refused_like_any_other(bench: Bench) -> None:
    number = bench.begin()
    good: Any = to_shared(bench.tiny.delta(1.0))
    name = next(iter(good["tensors"]))
    empty = {**good, "tensors": {**good["tensors"], name: np.zeros(0, dtype=np.uint8)}}
    shapes = ([0, 10**30], [0, 1 << 62, 4], [1] * 100_000)
    bad = [_edited(empty, "tensors", name, "shape", value=shape) for shape in shapes]
    bad.append(_edited(to_shared(bench.tiny.low_rank(1.0)), "content", "settings", "alpha", value=10**400))

    def fail() -> Any:
        raise RuntimeError("an error that nobody foresaw")

    for read in [*(lambda shared=shared: from_shared(shared) for shared in bad), fail]:
        with pytest.raises(ArtifactRefused) as refused:
            bench.send("ann", number, read)
        assert refused.value.problem[:500] in [reason for reason, _ in bench.keeper.registry.tenants.refusals("ann")]
    assert [line["decision"] for line in bench.audit.read()] == ["refused"] * (len(bad) + 1)
    numbers = _edited(to_shared(bench.tiny.metrics()), "content", "values", value={"emulator_tuned": 10**400})
    with pytest.raises(ArtifactRefused, match="not a finite number"):
        bench.send("ann", number, 1.0, metrics=lambda: from_shared(numbers))
    assert sum(count for _, count in bench.keeper.registry.tenants.refusals("ann")) == len(bad) + 2
    bench.send("ann", number, lambda: from_shared(good))


def test_a_long_refusal_is_short_where_it_is_recorded(bench: Bench) -> None:
    number = bench.begin()
    long = _edited(to_shared(bench.tiny.delta(1.0)), "kind", value="\x1b[2J" * 250_000)
    with pytest.raises(ArtifactRefused, match="kind is") as refused:
        bench.send("ann", number, lambda: from_shared(long, "delta"))
    (reason,) = [reason for reason, _ in bench.keeper.registry.tenants.refusals("ann")]
    assert bench.audit.read()[-1]["reason"] == reason == refused.value.problem
    assert reason.isprintable()
    assert len(reason) < 500


def test_what_is_no_artefact_is_refused_like_any_other(bench: Bench) -> None:
    number = bench.begin()
    good: Any = to_shared(bench.tiny.delta(1.0))
    bad = _malformed(good)
    for shared in bad:
        with pytest.raises(ArtifactRefused) as refused:
            bench.send("ann", number, lambda shared=shared: from_shared(shared))
        assert refused.value.problem in [reason for reason, _ in bench.keeper.registry.tenants.refusals("ann")]
    assert [line["decision"] for line in bench.audit.read()] == ["refused"] * len(bad)
    bench.send("ann", number, lambda: from_shared(good))
