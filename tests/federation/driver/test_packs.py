"""Data owners that share a process: who is in which pack, and a run in which they leave it one by one."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from scaleot_ray.artifacts.storage import read_artifact
from scaleot_ray.config import RunSettings, TenantSettings
from scaleot_ray.errors import ConfigError
from scaleot_ray.federation.driver.packs import Pack, Packs
from scaleot_ray.federation.driver.run_state import Tenant
from scaleot_ray.federation.driver.schedule import MachineSchedule, Work
from scaleot_ray.federation.run import run_local
from tests.tiny_run import WORDS, write_text, write_tiny_run

LORA = {"method": "lora", "steps": 8, "block_size": 32, "learning_rate": 1e-3, "lora_rank": 4}


def owner(name: str, **changes: Any) -> Tenant:
    """A data owner that waits."""
    data = {"path": "rows.jsonl"}
    return Tenant(TenantSettings.model_validate({"name": name, "train": data, "test": data, **changes}))


def any_number(_: list[Tenant]) -> bool:
    """There is room for as many as may be."""
    return True


def names(packs: Iterable[Pack]) -> list[list[str]]:
    """Who is in which."""
    return [[tenant.name for tenant in pack.tenants] for pack in packs]


def begun(packs: Packs, schedule: MachineSchedule, waiting: list[Tenant]) -> Pack:
    """The first pack of those that wait, begun."""
    pack = next(iter(packs.grouped(waiting, 9)))
    schedule.start(lambda: [] if schedule.has(pack.role) else [Work(pack.role, 1, 0, 1, lambda: None)])
    for tenant in pack.tenants:
        tenant.tuning = 1
    return pack


def test_only_those_that_claim_the_same_share() -> None:
    tenants = [owner("a"), owner("b", cpus=2), owner("c"), owner("d", node_labels={"site": "d"}), owner("e")]
    packs = Packs(2, MachineSchedule(2, 0, 1 << 30), any_number)
    assert names(packs.grouped(tenants, 9)) == [["a", "c"], ["e"], ["b"], ["d"]]
    assert [pack.role for pack in packs.grouped(tenants, 9)][:2] == ["data owners a, c", "data owner e"]


def test_no_pack_claims_more_than_there_is() -> None:
    tenants = [owner(name) for name in "abcde"]
    schedule = MachineSchedule(2, 0, 1 << 30)
    packs = Packs(4, schedule, lambda members: len(members) < 3)
    assert names(packs.grouped(tenants, 9)) == [["a", "b"], ["c", "d"], ["e"]]
    # One that is too large by itself is let begin, as the preflight has let it pass.
    assert names(Packs(4, schedule, lambda _: False).grouped(tenants[:2], 9)) == [["a"], ["b"]]


def test_who_shall_be_alone_is() -> None:
    tenants = [owner(name) for name in "abcd"]
    tenants[1].alone = True
    assert names(Packs(4, MachineSchedule(2, 0, 1 << 30), any_number).grouped(tenants, 9)) == [["a"], ["b"], ["c", "d"]]


def test_a_pack_is_known_once_the_schedule_has_taken_it() -> None:
    schedule = MachineSchedule(2, 0, 1 << 30)
    packs, tenants = Packs(2, schedule, any_number), [owner("a"), owner("b"), owner("c")]
    list(packs.grouped(tenants, 9))
    assert packs.of(tenants[0]) is None
    pack = begun(packs, schedule, tenants)
    assert (packs.of(tenants[1]), packs.of(tenants[2])) == (pack, None)
    schedule.over(pack.role)
    assert packs.of(tenants[1]) is None


def test_the_last_one_to_leave_ends_the_process() -> None:
    schedule = MachineSchedule(2, 0, 1 << 30)
    packs, (a, b) = Packs(2, schedule, any_number), (owner("a"), owner("b"))
    pack, told = begun(packs, schedule, [a, b]), list[str]()
    for tenant in (a, b, b):
        tenant.tuning = None
        packs.leave(tenant, lambda pack: told.append(f"{pack.role} goes on"), lambda pack: told.append("end"))
    assert told == ["data owners a, b goes on", "end"]
    assert pack.tenants == []


def test_whoever_leaves_before_it_has_begun_undoes_the_pack() -> None:
    schedule = MachineSchedule(2, 0, 1 << 30)
    packs, (a, b) = Packs(2, schedule, any_number), (owner("a"), owner("b"))
    pack = begun(packs, schedule, [a, b])
    a.tuning = b.tuning = None  # it waits for its place
    ended = list[Pack]()
    packs.leave(a, lambda _: pytest.fail("nobody tunes"), ended.append)
    assert ended == [pack]


def test_only_low_rank_pairs_can_share(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tenants_per_process is 2, but alice tunes with layers"):
        write_tiny_run(tmp_path, tenants_per_process=2)


def three(folder: Path, **changes: Any) -> RunSettings:
    """A run of three data owners with low-rank pairs, the last of whom has a row that cannot be read, far down."""
    settings = write_tiny_run(folder, tune=LORA, evaluator=False, **changes)
    rows = write_text(folder / "carol.jsonl", WORDS, 400)
    with rows.open("a") as file:
        file.write(json.dumps({"other": "column"}) + "\n")
    alice, bob = settings.tenants
    carol = alice.model_copy(
        update={"name": "carol", "train": alice.train.model_copy(update={"path": str(rows)})},
    )
    return settings.model_copy(update={"tenants": (alice, bob, carol)})


@pytest.mark.usefixtures("connected_ray")
def test_one_process_tunes_for_all_and_one_that_fails_leaves_alone(tmp_path: Path) -> None:
    stages = dict[str, set[str]]()
    packed = three(tmp_path / "packed", tenants_per_process=3, rounds={"quorum": 2})
    report = run_local(packed, on_progress=lambda one: stages.setdefault(one.tenant or "", set()).add(one.stage))
    (one,) = report.as_json()["rounds"]
    assert one["submitted"] == ["alice", "bob"]
    assert "data owner carol" in one["missing"]["carol"]
    assert "no column 'text'" in one["missing"]["carol"]
    assert {"tune alice"} < stages["alice"]
    starts = [line for line in (Path(packed.output) / "run.log").read_text().splitlines() if "tuning starts" in line]
    assert len(starts) == 3
    # What each gets is what it would get alone, but for the last digits.
    alone = three(tmp_path / "alone", rounds={"quorum": 1})
    alone = alone.model_copy(update={"tenants": alone.tenants[:1]})
    run_local(alone)
    ours, theirs = (read_artifact(Path(s.output) / "tenants" / "alice" / "delta").tensors for s in (packed, alone))
    assert ours.keys() == theirs.keys()
    largest = max(float(tensor.abs().max()) for tensor in theirs.values())
    assert all(float((ours[name] - theirs[name]).abs().max()) < 1e-4 * largest for name in ours)
