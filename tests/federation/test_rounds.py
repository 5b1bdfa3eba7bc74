"""Rounds of a whole run on a tiny model: what they begin with, who is in them, what a later run does."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from scaleot_ray.artifacts.audit import AuditLog
from scaleot_ray.artifacts.storage import read_artifact
from scaleot_ray.config import RunSettings, parse
from scaleot_ray.errors import ConfigError
from scaleot_ray.families.loading import load_base_model
from scaleot_ray.federation.preflight import check_aggregation
from scaleot_ray.federation.rounds.registry import AGGREGATE, Registry
from scaleot_ray.federation.run import run_local
from scaleot_ray.progress import Progress, TenantState
from scaleot_ray.stages.plug import plug_in
from tests.tiny_run import write_tiny_run

pytestmark = pytest.mark.usefixtures("connected_ray")

FEW = {"steps": 5, "block_size": 32, "learning_rate": 1e-3}


def registry_of(settings: RunSettings) -> Registry:
    """The registry of a run that has ended, to look at."""
    (path,) = Path(settings.output).glob("coordinator/*/registry.sqlite")
    return Registry(path, write=False)


@pytest.mark.parametrize(
    ("method", "how"), [("layers", "mean"), ("lora", "svd")], ids=["whole layers averaged", "low-rank updates"]
)
def test_two_rounds_build_on_one_another(tmp_path: Path, method: str, how: str) -> None:
    changes: dict[str, Any] = {
        "tune": {**FEW, "method": method},
        "evaluator": False,
        "rounds": {"count": 2},
        "aggregation": {"method": how},
    }
    settings = write_tiny_run(tmp_path, **changes)
    heard, states = list[Progress](), list[TenantState]()
    report = run_local(settings, on_progress=heard.append, on_state=states.append).as_json()
    for name in ("alice", "bob"):
        tuned = [progress for progress in heard if progress.stage == f"tune {name}"]
        assert [(one.tenant, one.round) for one in tuned if one.step == one.steps] == [(name, 1), (name, 2)]
        way = [(number, state) for number in (1, 2) for state in ("waiting", "tuning", "submitted")]
        assert [(told.round, told.state) for told in states if told.tenant == name][:6] == way
    assert {(progress.tenant, progress.round) for progress in heard if progress.stage == "stage 1"} == {(None, None)}
    assert [(one["number"], one["state"], one["submitted"]) for one in report["rounds"]] == [
        (1, "finished", ["alice", "bob"]),
        (2, "finished", ["alice", "bob"]),
    ]
    registry = registry_of(settings)
    assert report["aggregate"]["directory"] == str(registry.plug_ins.of(AGGREGATE)[1].folder)
    first, second = registry.plug_ins.of(AGGREGATE)
    assert registry.rounds.get(2).start == first.digest
    (alice,) = (one for one in registry.submissions.of_round(2) if one.tenant == "alice")
    begun = read_artifact(alice.folder).manifest.content
    assert begun.start == first.digest  # type: ignore[union-attr]
    own, latest = read_artifact(Path(settings.output) / "tenants" / "alice" / "delta"), read_artifact(second.folder)
    assert (own.digest, alice.norm > 0, len(alice.data_digest or "")) == (alice.digest, True, 64)
    if method == "layers":
        deltas = [read_artifact(one.folder).tensors for one in registry.submissions.of_round(2)]
        for name, tensor in latest.tensors.items():
            assert torch.allclose(tensor, (deltas[0][name] + deltas[1][name]) / 2, atol=1e-7)
    crossed = [(line["sender"], line["recipient"], line["kind"]) for line in AuditLog(report["audit"]).read()]
    assert crossed.count(("model owner", "data owner alice", "delta")) == 1  # the aggregate, to begin round 2 with
    emulator = read_artifact(Path(settings.output) / "emulator")
    base = load_base_model(settings.model)
    for number, delta in enumerate((own, latest)):  # what began with an aggregate is a plug-in like any other
        plug_in(base, delta, emulator.manifest, tmp_path / f"plugged-{number}", emulator_files=emulator.files)
    # Everything is done: nobody tunes again, until more rounds are asked for.
    heard, states = [], []
    again = run_local(settings, on_progress=heard.append, on_state=states.append).as_json()
    assert states == [TenantState(name, "submitted", 2) for name in ("alice", "bob")]
    assert (again["rounds"], [tenant["delta_digest"] for tenant in again["tenants"]]) == (
        [],
        [tenant["delta_digest"] for tenant in report["tenants"]],
    )
    assert not any(progress.stage.startswith("tune") for progress in heard)


def test_deadlines_of_a_round_and_of_one_data_owner(tmp_path: Path) -> None:
    changes = {"evaluator": False, "rounds": {"deadline": 40, "quorum": 1}, "tenants_at_once": 1}
    settings = write_tiny_run(tmp_path, tune=FEW, **changes)
    alice, bob = settings.tenants
    endless = settings.tune.model_copy(update={"steps": 1_000_000})
    slow = bob.model_copy(update={"tune": endless, "deadline": 15})
    slower = bob.model_copy(update={"tune": endless, "name": "carol"})
    heard, states = list[Progress](), list[TenantState]()
    settings = settings.model_copy(update={"tenants": (slow, alice, slower)})
    report = run_local(settings, on_progress=heard.append, on_state=states.append).as_json()
    (one,) = report["rounds"]
    assert (one["submitted"], one["missing"]) == (
        ["alice"],
        {"bob": "bob took longer than its deadline of 15 seconds.", "carol": "submitted nothing in time"},
    )
    left_out = [told for told in states if told.state == "left out"]
    assert left_out == [TenantState(name, "left out", 1, reason) for name, reason in one["missing"].items()]
    assert [tenant["delta_digest"] is None for tenant in report["tenants"]] == [True, False, True]
    # One at a time, though there are two processors.
    tuned = [progress.stage for progress in heard if progress.stage.startswith("tune ")]
    assert [name for name, _ in itertools.groupby(tuned)] == ["tune bob", "tune alice", "tune carol"]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"aggregation": {"method": "svd"}}, "svd is not right for deltas of tune.method=layers"),
        (
            {"aggregation": {"method": "concat"}, "tune": {"method": "lora"}, "rounds": {"count": 2}},
            "adds up the ranks",
        ),
        (
            {"aggregation": {"method": "svd", "rank": 3}, "tune": {"method": "lora"}, "rounds": {"count": 2}},
            "data owners tune with rank 16, alpha 32, and aggregation.rank is 3",
        ),
        ({"rounds": {"count": 2}}, "rounds.count is 2, but without aggregation"),
        ({"rounds": {"quorum": 3}}, "rounds.quorum is 3, but there are 2 data owners"),
    ],
)
def test_what_does_not_go_together_is_said_first(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        check_aggregation(write_tiny_run(tmp_path, **changes))


def test_one_method_for_all_who_aggregate(tmp_path: Path) -> None:
    settings = write_tiny_run(tmp_path, aggregation={})
    values = settings.model_dump(exclude_unset=True)
    values["tenants"][1]["tune"] = {"method": "lora"}
    with pytest.raises(ConfigError, match="different methods, layers and lora"):
        check_aggregation(parse(RunSettings, values))
