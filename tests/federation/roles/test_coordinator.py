"""The coordinator: everything that crosses is checked, recorded, and the shared copy stays what it was."""

from __future__ import annotations

import re
import shutil
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch
from prometheus_client.parser import text_string_to_metric_families
from ray.exceptions import RayActorError

from scaleot_ray.artifacts.artifact import Artifact
from scaleot_ray.artifacts.audit import AuditLog
from scaleot_ray.artifacts.crossing import crossing_bytes
from scaleot_ray.artifacts.manifest import MetricsContent
from scaleot_ray.artifacts.storage import read_artifact
from scaleot_ray.config import AggregationSettings, EmulatorSettings, RoundSettings
from scaleot_ray.emulator.assemble import assemble
from scaleot_ray.errors import ArtifactRefused, RunFailed
from scaleot_ray.evaluation.loss import LossScore
from scaleot_ray.evaluation.table import TenantTable, table_json
from scaleot_ray.federation.roles.coordinator import Charge, Coordinator
from scaleot_ray.federation.roles.data_owner import DataOwner, Part
from scaleot_ray.federation.roles.object_store import check_unchanged, from_shared, to_shared
from scaleot_ray.federation.roles.role import Present, Role, start, stop
from scaleot_ray.federation.roles.table_gate import pack_table
from scaleot_ray.progress import Progress
from scaleot_ray.resources.session import Session
from scaleot_ray.stages.build import build
from scaleot_ray.stages.tune import tune_emulator
from tests.tiny_run import write_tiny_run


@dataclass
class Parts:
    """Artefacts of a tiny run."""

    folder: Path
    emulator: Artifact
    delta: Artifact
    metrics: Artifact


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """An emulator that may leave, one that must not, a delta and metrics."""
    folder = tmp_path_factory.mktemp("parts")
    settings = write_tiny_run(folder, tune={"steps": 2})
    for name, emulator in (
        ("emulator", settings.emulator),
        ("open", EmulatorSettings(alpha=0, beta=0, plug_in_layers=2, allow_unprotected=True)),
    ):
        build(settings.model, settings.public, settings.stage_one, emulator, folder / name, cache=folder / "cache")
    artifact, alice = read_artifact(folder / "emulator"), settings.tenants[0]
    result = tune_emulator(artifact, alice.train, settings.tune, folder / "alice", test=alice.test, device="cpu")
    return Parts(folder, artifact, result.delta, read_artifact(folder / "alice" / "metrics"))


@pytest.fixture
def coordinator(connected_ray: Session, tmp_path: Path) -> Iterator[Any]:
    """A coordinator of a run in ``tmp_path`` that lives for one test."""
    charge = Charge(str(tmp_path), str(tmp_path / "registry"), RoundSettings(), None, {}, {})
    actor = start(Coordinator, 1, 0, charge, mark="", claim=False)
    yield actor
    stop(actor)


@dataclass
class Published:
    """A coordinator whose emulator is out, in a round of data owners; each test is about one of them.

    Attributes:
        folder: the run's.
        coordinator: the actor.
        audit: its log.
        tokens: of the data owners.
    """

    folder: Path
    coordinator: Any
    audit: AuditLog
    tokens: dict[str, str]


@pytest.fixture(scope="module")
def published(connected_ray: Session, parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Published]:
    """One for all tests that leave it as it was."""
    folder = tmp_path_factory.mktemp("published")
    rounds, tables = RoundSettings(quorum=1), {"bob": "loss"}
    charge = Charge(str(folder), str(folder / "registry"), rounds, None, {}, tables, lease_seconds=3600.0)
    actor = start(Coordinator, 1, 0, charge, mark="", claim=False)
    publish(actor, parts.folder / "emulator", folder, "data owner alice", "data owner bob", "evaluator alice")
    tokens = {name: ray.get(actor.admit.remote(name, {})) for name in ("alice", "cas", "dora")}
    ray.get(actor.begin_round.remote([*tokens]))
    yield Published(folder, actor, AuditLog(folder / "audit.jsonl"), tokens)
    stop(actor)


def publish(coordinator: Any, emulator: Path, folder: Path, *recipients: str) -> None:
    """Has a coordinator of the run in ``folder`` publish an emulator."""
    shutil.copytree(emulator, folder / "emulator")
    ray.get(coordinator.publish.remote(list(recipients) or ["data owner alice"]))


def begin(coordinator: Any) -> str:
    """Begins a round of alice alone; gives her token."""
    token: str = ray.get(coordinator.admit.remote("alice", {}))
    assert ray.get(coordinator.begin_round.remote(["alice"])).submitted == {"alice": False}
    return token


@ray.remote(num_cpus=0)
def write_in_place(reference: list[Any]) -> None:
    """A reader that trains what it should have copied."""
    artifact = from_shared(ray.get(reference[0]))
    with torch.no_grad():
        artifact.tensors["model.layers.0.mlp.up_proj.weight"].mul_(2.0)


def test_the_shared_copy_is_watched_to_the_end(coordinator: Any, parts: Parts, tmp_path: Path) -> None:
    publish(coordinator, parts.folder / "emulator", tmp_path)
    reference = ray.get(coordinator.emulator.remote())
    ray.get(coordinator.finish.remote())
    ray.get(write_in_place.remote(reference))
    with pytest.raises(RunFailed, match=r"coordinator found that tensor 'model.layers.0.mlp.up_proj.weight'"):
        ray.get(coordinator.finish.remote())


@pytest.mark.parametrize("method", ["layers", "lora", "bottleneck"])
def test_tuning_shares_what_is_frozen_and_copies_what_it_trains(parts: Parts, tmp_path: Path, method: str) -> None:
    shared = from_shared(to_shared(parts.emulator))
    for name, parameter in assemble(shared).named_parameters():
        assert parameter.data_ptr() == shared.tensors[name].data_ptr()
        assert not parameter.requires_grad
    settings = write_tiny_run(parts.folder, tune={"steps": 3, "method": method})
    result = tune_emulator(shared, settings.tenants[0].train, settings.tune, tmp_path, device="cpu")
    assert any(tensor.any() for tensor in result.delta.tensors.values())
    check_unchanged(shared, "data owner alice")


def test_crossings_are_recorded_one_by_one(published: Published, parts: Parts) -> None:
    coordinator, lines = published.coordinator, published.audit.read()
    token = published.tokens["alice"]
    ray.get(coordinator.submit.remote("alice", token, 1, to_shared(parts.delta), to_shared(parts.metrics)))
    entry = ray.get(coordinator.entry.remote("alice"))
    assert (entry.delta_digest, entry.delta_bytes) == (parts.delta.digest, parts.delta.nbytes)
    assert entry.metrics["emulator_tuned"] > 0
    assert from_shared(ray.get(coordinator.delta.remote("alice"))).digest == parts.delta.digest
    lines = lines[:3] + published.audit.read()[len(lines) :]  # the emulator's, and those since
    assert [(line["sender"], line["recipient"], line["kind"], line["decision"]) for line in lines] == [
        ("model owner", "data owner alice", "emulator", "sent"),
        ("model owner", "data owner bob", "emulator", "sent"),
        ("model owner", "evaluator alice", "emulator", "sent"),
        ("data owner alice", "model owner", "delta", "sent"),
        ("data owner alice", "model owner", "metrics", "sent"),
        ("model owner", "evaluator alice", "delta", "sent"),
    ]


def test_an_open_or_a_damaged_emulator_is_refused_and_recorded(coordinator: Any, parts: Parts, tmp_path: Path) -> None:
    audit = AuditLog(tmp_path / "audit.jsonl")
    with pytest.raises(ArtifactRefused, match="hides nothing"):
        publish(coordinator, parts.folder / "open", tmp_path)
    (line,) = audit.read()
    assert line["decision"] == "refused"
    assert "hides nothing" in line["reason"]
    (tmp_path / "emulator" / "manifest.json").write_text("{")
    with pytest.raises(ArtifactRefused, match="is no valid JSON"):
        ray.get(coordinator.publish.remote(["data owner alice"]))
    _, line = audit.read()
    assert (line["sender"], line["recipient"], line["kind"]) == ("model owner", "data owners", "emulator")
    assert (line["bytes"], line["decision"]) == (0, "refused")
    assert "manifest.json" in line["reason"]


def test_what_is_no_delta_is_refused_and_recorded(published: Published, parts: Parts) -> None:
    coordinator, before = published.coordinator, len(published.audit.read())
    cas = ("cas", published.tokens["cas"], 1)
    more = Artifact.create(
        "delta",
        parts.delta.manifest.content,
        {**parts.delta.tensors, "rows": torch.zeros(3)},
        family="llama",
        parent_digest=parts.emulator.digest,
    )
    with pytest.raises(ArtifactRefused, match="'rows'"):
        ray.get(coordinator.submit.remote(*cas, to_shared(more), to_shared(parts.metrics)))
    altered = to_shared(parts.delta)
    name = next(iter(altered["tensors"]))
    altered["tensors"][name] = altered["tensors"][name] ^ 1
    with pytest.raises(ArtifactRefused, match="was altered"):
        ray.get(coordinator.submit.remote(*cas, altered, to_shared(parts.metrics)))
    numbers = Artifact.create("metrics", MetricsContent(values={"row\n1": 1.0}), {})
    with pytest.raises(ArtifactRefused, match="metric name"):
        ray.get(coordinator.submit.remote(*cas, to_shared(parts.delta), to_shared(numbers)))
    with pytest.raises(ArtifactRefused, match="of kind 'metrics' as its delta"):
        ray.get(coordinator.submit.remote(*cas, to_shared(parts.metrics), to_shared(parts.metrics)))
    cut = to_shared(parts.delta)
    cut["tensors"][name] = cut["tensors"][name][:-1]
    with pytest.raises(ArtifactRefused, match="its manifest says"):
        ray.get(coordinator.submit.remote(*cas, cut, to_shared(parts.metrics)))
    unreadable = {**to_shared(parts.metrics), "manifest": b"{"}
    with pytest.raises(ArtifactRefused, match="no valid JSON"):
        ray.get(coordinator.submit.remote(*cas, to_shared(parts.delta), unreadable))
    assert ray.get(coordinator.entry.remote("cas")) is None
    lines = published.audit.read()[before:]
    assert [(line["kind"], line["decision"]) for line in lines] == [
        ("delta", "refused"),
        ("delta", "refused"),
        *(("delta", "sent"), ("metrics", "refused")),
        ("delta", "refused"),
        ("delta", "refused"),
        *(("delta", "sent"), ("metrics", "refused")),
    ]
    assert {(line["sender"], line["recipient"]) for line in lines} == {("data owner cas", "model owner")}
    assert all(line["reason"] for line in lines if line["decision"] == "refused")


def test_an_evaluators_table_is_a_crossing_of_its_own(published: Published) -> None:
    coordinator = published.coordinator
    score = LossScore(np.array([1.5, 2.5]), np.array([1, 2]))
    table = TenantTable("bob", "loss", {"plug_in": score, "full_tuned": None})
    with pytest.raises(ArtifactRefused, match="'evaluator alice' is not declared"):
        ray.get(coordinator.submit_table.remote("alice", pack_table(table)))
    bad = TenantTable("bob", "loss", {"plug_in": LossScore(np.array([1.5, np.nan]), np.array([1, 2]))})
    with pytest.raises(ArtifactRefused, match="plug_in: sums holds something else than finite numbers"):
        ray.get(coordinator.submit_table.remote("bob", pack_table(bad)))
    ray.get(coordinator.submit_table.remote("bob", pack_table(table)))
    assert table_json(ray.get(coordinator.table.remote("bob"))) == table_json(table)
    lines = [line for line in published.audit.read() if line["kind"] == "table"]
    assert [line["decision"] for line in lines] == ["refused", "refused", "sent"]
    assert [line["sender"] for line in lines] == ["unknown sender", "evaluator bob", "evaluator bob"]
    assert lines[2]["bytes"] == len(pack_table(table))


def test_a_coordinator_that_was_killed_goes_on_where_it_was(coordinator: Any, parts: Parts, tmp_path: Path) -> None:
    publish(coordinator, parts.folder / "emulator", tmp_path)
    token = begin(coordinator)
    (lost,) = ray.get(coordinator.emulator.remote())
    submission = ("alice", token, 1, to_shared(parts.delta), to_shared(parts.metrics))
    ray.get(coordinator.submit.remote(*submission))
    before: Present = ray.get(coordinator.present.remote())
    psutil.Process(before.pid).kill()
    ray.get(coordinator.submit.remote(*submission))  # whoever has got no answer asks again
    assert ray.get(coordinator.present.remote()).pid != before.pid
    (reference,) = ray.get(coordinator.emulator.remote())
    assert from_shared(ray.get(reference)).digest == parts.emulator.digest
    assert reference != lost
    ended = ray.get(coordinator.end_round.remote(1))
    assert (ended.round.state, ended.submitted) == ("finished", {"alice": True})
    ray.get(coordinator.finish.remote())


def test_the_log_says_what_happened_when_to_whom(coordinator: Any, parts: Parts, tmp_path: Path) -> None:
    publish(coordinator, parts.folder / "emulator", tmp_path)
    token = begin(coordinator)
    ray.get(coordinator.begin_part.remote(1, "alice"))
    with pytest.raises(ArtifactRefused):
        ray.get(coordinator.submit.remote("alice", "guessed", 1, to_shared(parts.delta), to_shared(parts.metrics)))
    ray.get(coordinator.submit.remote("alice", token, 1, to_shared(parts.delta), to_shared(parts.metrics)))
    psutil.Process(ray.get(coordinator.present.remote()).pid).kill()
    ray.get(coordinator.end_round.remote(1))
    lines = [line.split(" ", 1) for line in (tmp_path / "run.log").read_text().splitlines()]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", time) for time, _ in lines)
    said = [what for _, what in lines]
    assert said[0].startswith(f"INFO emulator {parts.emulator.digest[:16]} ({parts.emulator.nbytes} bytes)")
    assert said[1:4] == [
        "INFO tenant=alice admitted",
        "INFO round=1 begins with 1 data owners, quorum 1",
        "INFO round=1 tenant=alice tuning starts (attempt 1)",
    ]
    assert said[4] == "WARNING refused: it does not carry the token of alice."
    assert said[5].startswith(f"INFO round=1 tenant=alice submitted {parts.delta.digest[:16]} ({parts.delta.nbytes} by")
    assert said[6] == "WARNING the coordinator's process had died; it goes on from the registry"
    assert said[7].startswith("INFO round=1 finished (1 of 1 deltas, ")


def test_an_emulator_from_another_nodes_disk_is_written_here(published: Published, parts: Parts) -> None:
    coordinator, written, digest = published.coordinator, published.folder / "emulator", parts.emulator.digest
    assert ray.get(coordinator.has_emulator.remote(digest))
    assert not ray.get(coordinator.has_emulator.remote("0" * 64))
    shutil.rmtree(written)
    assert not ray.get(coordinator.has_emulator.remote(digest))
    damaged = to_shared(parts.emulator)
    name = next(iter(damaged["tensors"]))
    damaged["tensors"] = {**damaged["tensors"], name: damaged["tensors"][name].copy()}
    damaged["tensors"][name][0] ^= 1
    with pytest.raises(ArtifactRefused, match=name):
        ray.get(coordinator.take_emulator.remote(damaged))
    assert not written.exists()
    ray.get(coordinator.take_emulator.remote(to_shared(parts.emulator)))
    assert read_artifact(written).digest == digest


def test_prometheus_finds_a_runs_metrics(published: Published, parts: Parts) -> None:
    coordinator, token = published.coordinator, published.tokens["dora"]
    ray.get(coordinator.begin_part.remote(1, "dora"))
    ray.get(
        coordinator.report.remote(Progress("tune dora", 3, 12, 2.5, 100.0, tenant="dora", round=1), "data owner dora")
    )
    with pytest.raises(ArtifactRefused):
        ray.get(coordinator.submit.remote("dora", "guessed", 1, to_shared(parts.delta), to_shared(parts.metrics)))
    ray.get(coordinator.submit.remote("dora", token, 1, to_shared(parts.delta), to_shared(parts.metrics)))
    work = {"run": published.folder.name, "role": "data owner", "tenant": "dora", "round": "1", "stage": "tune"}
    crossing = {"run": published.folder.name, "sender": "data owner dora", "recipient": "model owner", "kind": "delta"}
    part = {"run": published.folder.name, "tenant": "dora", "round": "1"}
    wanted = [
        ("ray_scaleot_progress_ratio", work, 0.25),
        ("ray_scaleot_loss_nats", work, 2.5),
        ("ray_scaleot_round_quorum", {"run": published.folder.name, "round": "1"}, 1),
        ("ray_scaleot_tuning_starts_total", part, 1),
        ("ray_scaleot_crossings_total", {**crossing, "sender": "unknown sender", "decision": "refused"}, 1),
        ("ray_scaleot_crossed_bytes_total", {**crossing, "decision": "sent"}, crossing_bytes(parts.delta.manifest)),
    ]
    deadline = time.monotonic() + 60  # Ray passes metrics on every few seconds
    while left := [one for one in wanted if one not in (found := exported())]:
        assert time.monotonic() < deadline, (left, found)
        time.sleep(1)
    assert ("ray_scaleot_progress_ratio", {**work, "tenant": "bob"}, 0.25) not in found


def exported() -> list[tuple[str, dict[str, str], float]]:
    """Our metrics as this node exports them: name, our tags, value."""
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    ours = ("run", "role", "tenant", "round", "stage", "sender", "recipient", "kind", "decision", "state")
    return [
        (sample.name, {key: value for key, value in sample.labels.items() if key in ours}, sample.value)
        for family in families
        if family.name.startswith("ray_scaleot")
        for sample in family.samples
    ]


@pytest.mark.parametrize("seconds", [0.0, 0.02, 0.2])
def test_killed_while_it_ends_a_round_it_ends_it_once(
    connected_ray: Session, parts: Parts, tmp_path: Path, seconds: float
) -> None:
    rounds, how = RoundSettings(count=2), AggregationSettings(server="momentum")
    charge = Charge(str(tmp_path), str(tmp_path / "registry"), rounds, how, {"alice": 1.0}, {})
    actor = start(Coordinator, 1, 0, charge, mark="", claim=False)
    publish(actor, parts.folder / "emulator", tmp_path)
    token = begin(actor)
    ray.get(actor.submit.remote("alice", token, 1, to_shared(parts.delta), to_shared(parts.metrics)))
    process = psutil.Process(ray.get(actor.present.remote()).pid)
    answer = actor.end_round.remote(1)
    time.sleep(seconds)
    process.kill()
    ended = ray.get(answer)
    assert (ended.round.state, ended.submitted, ended.last) == ("finished", {"alice": True}, False)
    again = ray.get(actor.end_round.remote(1))
    assert again.round == ended.round
    made = ray.get(actor.in_common.remote())
    assert (made.round, made.version) == (1, 1)
    assert read_artifact(made.folder).digest == made.digest
    assert ray.get(actor.begin_round.remote(["alice"])).round.start == made.digest
    stop(actor)


def test_a_delta_that_comes_between_two_rounds_counts_in_the_next(
    connected_ray: Session, parts: Parts, tmp_path: Path
) -> None:
    settings = write_tiny_run(parts.folder, tune={"steps": 2})
    rounds = RoundSettings(count=2, quorum=1, staleness=1)
    charge = Charge(str(tmp_path), str(tmp_path / "registry"), rounds, AggregationSettings(), {}, {})
    actor = start(Coordinator, 1, 0, charge, mark="", claim=False)
    publish(actor, parts.folder / "emulator", tmp_path)
    alice, bob = (ray.get(actor.admit.remote(name, {})) for name in ("alice", "bob"))
    ray.get(actor.begin_round.remote(["alice", "bob"]))
    first = to_shared(parts.delta), to_shared(parts.metrics)
    assert ray.get(actor.submit.remote("alice", alice, 1, *first))
    assert ray.get(actor.end_round.remote(1)).round.state == "finished"
    part = Part(settings.tenants[1], settings.tune, None, str(tmp_path / "bob"))
    owner = start(DataOwner, 1, 0, 1, actor, part, mark="", claim=False)
    late = owner.tune.remote(1, bob)  # the round that it tunes for is over before it begins
    while not (tmp_path / "bob" / "metrics").exists():  # it has tuned, and sends
        assert ray.wait([late], timeout=0.2)[0] == []
    assert ray.wait([late], timeout=3)[0] == []
    assert not ray.get(actor.submit.remote("bob", bob, 1, *first))
    opened = ray.get(actor.begin_round.remote(["alice", "bob"]))
    assert (opened.round.number, opened.submitted) == (2, {"alice": False, "bob": False})
    ray.get(late, timeout=60)
    entry = ray.get(actor.entry.remote("bob"))
    assert (entry.round, ray.get(actor.end_round.remote(2)).submitted) == (2, {"alice": False, "bob": True})
    stop(owner)
    stop(actor)


def test_without_a_driver_the_coordinator_ends_itself(connected_ray: Session, tmp_path: Path) -> None:
    charge = Charge(str(tmp_path), str(tmp_path), RoundSettings(), None, {}, {}, lease_seconds=2.0)
    actor = start(Coordinator, 1, 0, charge, mark="", claim=False, name="c", lifetime="detached")
    process = psutil.Process(ray.get(actor.present.remote()).pid)
    deadline = time.monotonic() + 4
    while time.monotonic() < deadline:  # as long as it is asked, it stays
        ray.get(actor.reports.remote())
        time.sleep(0.2)
    assert process.is_running()
    psutil.wait_procs([process], timeout=20)
    assert not process.is_running()
    with pytest.raises(RayActorError):
        ray.get(actor.present.remote())


@pytest.mark.parametrize("cpus", [1, 2])
def test_an_actor_has_exactly_its_threads(connected_ray: Session, cpus: int) -> None:
    actor = start(ray.remote(Role), cpus, 0, "someone", cpus, mark="")
    present: Present = ray.get(actor.present.remote())
    environment = psutil.Process(present.pid).environ()
    stop(actor)
    assert (present.threads, present.gpus) == (cpus, 0)
    assert {environment[f"{name}_NUM_THREADS"] for name in ("OMP", "MKL", "OPENBLAS", "RAYON")} == {str(cpus)}
    assert environment["CUDA_VISIBLE_DEVICES"] == ""
