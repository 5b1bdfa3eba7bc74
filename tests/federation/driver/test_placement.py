"""Several nodes: a run's parts find theirs, each node holds one copy of the emulator, and waiting has an end."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scaleot_ray.config import RunSettings
from scaleot_ray.errors import ConfigError, ResourcesMissing
from scaleot_ray.federation import environment
from scaleot_ray.federation.driver import placement
from scaleot_ray.federation.driver.placement import check_labels, check_places, check_sharing
from scaleot_ray.federation.driver.schedule import Work
from scaleot_ray.federation.run import run_local
from scaleot_ray.resources.nodes import Node
from tests.cli.command import scaleot
from tests.tiny_run import write_tiny_run

GB = 10**9


def node(address: str = "10.0.0.1", **changes: Any) -> Node:
    """A node of four processors."""
    values: dict[str, Any] = {
        "id": address,
        "address": address,
        "labels": {"ray.io/node-id": address},
        "cpus": 4.0,
        "gpus": 0.0,
        "memory": 8 * GB,
        "object_store": 2 * GB,
        "free_cpus": 4.0,
        "free_gpus": 0.0,
        "free_memory": 8 * GB,
    }
    return Node(**{**values, **changes})


def work(role: str = "data owner alice", cpus: int = 1, memory: int = GB, gpus: float = 0, **labels: str) -> Work:
    """Work that does nothing."""
    return Work(role, cpus, gpus, memory, lambda: None, labels)


def test_what_fits_on_some_node_passes() -> None:
    nodes = [node("10.0.0.1", cpus=1.0), node("10.0.0.2", labels={"site": "a"}, gpus=1.0)]
    check_places([work(cpus=4), work(gpus=0.5), work(site="a")], GB, nodes)


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        (
            work(cpus=5),
            r"asks for 5 processors, 1\.0 GB of memory on one node, and no node has that; 10\.0\.0\.1 has 4",
        ),
        (work(gpus=1), r"1 processors, 1 GPUs"),
        (work(memory=9 * GB), r"9\.0 GB of memory"),
        (work(cpus=2, site="a"), r"no node with its labels has that; 10\.0\.0\.2 has 1 processors"),
    ],
)
def test_what_fits_on_no_node_is_refused(asked: Work, problem: str) -> None:
    nodes = [node("10.0.0.1"), node("10.0.0.2", cpus=1.0, labels={"site": "a"})]
    with pytest.raises(ResourcesMissing, match=problem) as caught:
        check_places([work(), asked], GB, nodes)
    assert "placement.autoscaling" in caught.value.remedy


def test_what_some_node_holds_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [node("10.0.0.1"), node("10.0.0.2", labels={"site": "a"}, memory=4 * GB)]
    monkeypatch.setattr(placement, "living_nodes", lambda: nodes)
    there = placement.Placement(300, None)
    asked = [work(memory=8 * GB), work(memory=9 * GB), work(memory=8 * GB, site="a"), work(memory=4 * GB, site="a")]
    assert [there.fits(one) for one in asked] == [True, False, False, True]
    assert placement.Placement(300, None, autoscaling=True).fits(asked[1])


def test_an_object_store_too_small_for_the_emulator_is_refused() -> None:
    nodes = [node("10.0.0.1"), node("10.0.0.2", object_store=GB)]
    with pytest.raises(ResourcesMissing, match=r"may be put on 10\.0\.0\.2, whose object store has 1\.0 GB"):
        check_places([work()], 2 * GB, nodes)
    check_places([work(site="a")], 2 * GB, [node(labels={"site": "a"}), nodes[1]])


def test_a_node_that_a_part_does_not_fit_on_needs_no_object_store() -> None:
    small = node("10.0.0.2", cpus=0.0, object_store=GB)
    check_places([work()], 2 * GB, [node("10.0.0.1"), small])


def test_the_node_of_the_job_shares_the_emulator() -> None:
    check_sharing(2 * GB, node())
    with pytest.raises(ResourcesMissing, match=r"from 10\.0\.0\.1, the node of this job, .* 2\.0 GB; .* up to 3\.0 GB"):
        check_sharing(3 * GB, node())


@pytest.mark.usefixtures("connected_ray")
@pytest.mark.parametrize("autoscaling", [False, True])
def test_a_run_on_a_cluster_looks_at_the_node_of_its_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autoscaling: bool
) -> None:
    # Parts have nodes of their own, and this one, that of the job, computes nothing.
    nodes = [node("10.0.0.1", cpus=0.0, object_store=1), node("10.0.0.2")]
    monkeypatch.setattr(environment, "living_nodes", lambda: nodes)
    settings = on_cluster(tmp_path, evaluator=False, placement={"autoscaling": autoscaling})
    with pytest.raises(ResourcesMissing, match=r"shares the emulator from 10\.0\.0\.1"):
        run_local(settings)


def test_labels_that_no_node_has_are_refused(tmp_path: Path) -> None:
    settings = on_cluster(tmp_path, alice={"site": "a"})
    nodes = [node(labels={"site": "b", "ray.io/node-id": "1"})]
    with pytest.raises(
        ResourcesMissing, match=r"^tenants\.0\.node_labels: no node .* has site=a; 10\.0\.0\.1 has site=b"
    ):
        check_labels(settings, nodes)
    check_labels(settings, [*nodes, node(labels={"site": "a"})])


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"environment": "local", "placement": {"timeout": 5}}, "placement is about a cluster's nodes"),
        ({"placement": {"owner_labels": {"site": "in(a, b)"}}}, "placement.owner_labels"),
        ({"placement": {"timeout": 0}}, "placement.timeout"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        write_tiny_run(tmp_path, **{"environment": "cluster", **changes})


def test_a_run_without_a_cluster_says_so(tmp_path: Path) -> None:
    # A process of its own: this one may be connected to the Ray of other tests.
    (tmp_path / "run.yaml").write_text(json.dumps(on_cluster(tmp_path).model_dump(mode="json")))
    error = scaleot("run", tmp_path / "run.yaml", "--format", "json", RAY_ADDRESS="").error
    assert (error["code"], error["type"]) == (4, "ResourcesMissing")
    assert error["message"].startswith("environment: cluster needs a Ray to work on")
    assert "ray job submit" in error["remedy"]


def on_cluster(folder: Path, alice: dict[str, str] | None = None, **changes: Any) -> RunSettings:
    """A tiny run in the environment ``cluster``; alice asks for labels."""
    settings = write_tiny_run(folder, environment="cluster", **changes)
    first = settings.tenants[0].model_copy(update={"node_labels": alice or {}})
    return settings.model_copy(update={"tenants": (first, *settings.tenants[1:])})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """A cluster of three nodes on this machine, on which two runs each lose a node: see ``nodes_scenario``."""
    folder = tmp_path_factory.mktemp("nodes")
    # Long enough that nobody is done when the last one has begun, however slowly its process comes.
    common = {"evaluator": False, "tune": {"steps": 300}}
    scenarios = [
        {
            "settings": {**common, "rounds": {"quorum": 1}, "placement": {"timeout": 3}},
            "labels": {"alice": {"site": "alice"}, "bob": {"site": "bob"}},
            "kill": True,
        },
        {
            "settings": {**common, "output": str(folder / "second"), "placement": {"owner_labels": {"site": "bob"}}},
            "labels": {"alice": {"disk": "shared"}},
            "tenants": 1,
            "kill": True,
        },
    ]
    command = [sys.executable, "-m", "tests.federation.driver.nodes_scenario", str(folder), json.dumps(scenarios)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == 2, done.stderr[-3000:]
    return found


def test_data_owners_tune_where_their_data_is(runs: list[dict[str, Any]]) -> None:
    both = runs[0]
    assert both["actors"]["Coordinator"] == ["head"]
    assert both["actors"]["DataOwner"] == ["alice", "bob"]
    assert set(both["actors"]["ModelOwner"]) < {"alice", "bob", "head"}
    assert runs[1]["actors"]["ModelOwner"] == ["bob"]


def test_each_node_holds_one_copy_of_the_emulator(runs: list[dict[str, Any]]) -> None:
    # The coordinator put it on the head; every other node fetched it once.
    assert runs[0]["copies"] == ["alice", "bob", "head"]
    assert len(runs[1]["copies"]) == 2


def test_a_lost_node_costs_its_data_owner_the_round_and_nobody_else_anything(runs: list[dict[str, Any]]) -> None:
    (lost,) = runs[0]["report"]["rounds"]
    assert runs[0]["killed"] == ["alice"]
    assert lost["submitted"] == ["bob"]
    assert lost["missing"]["alice"].startswith(
        "data owner alice found no place on the cluster within 3 seconds: it asks"
    )
    alice, bob = runs[0]["report"]["tenants"]
    assert alice["delta_digest"] is None
    assert bob["delta_digest"] is not None
    assert any("died and starts again (2 of 3)" in stage for stage in runs[0]["said"])
    died = next(line for line in runs[0]["log"] if "data owner alice died" in line)
    assert re.search(r"died: its (process on )?node [\d.]+ was (killed, or that node was )?lost", died), died


def test_a_data_owner_goes_on_at_another_node_with_its_labels(runs: list[dict[str, Any]]) -> None:
    (again,) = runs[1]["report"]["rounds"]
    assert again["submitted"] == ["alice"]
    assert runs[1]["actors"]["DataOwner"] == ["alice", "bob"]  # one after the other, whichever came first
    assert any("died and starts again" in stage for stage in runs[1]["said"])


def test_no_place_is_kept_after_a_run(runs: list[dict[str, Any]]) -> None:
    assert [run["placement_groups"] for run in runs] == [["REMOVED"], ["REMOVED"]]
