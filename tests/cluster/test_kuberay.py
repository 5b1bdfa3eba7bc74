"""The KubeRay manifests say what they must, and a manifest that does not is caught."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from copy import deepcopy
from importlib.metadata import version
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from scaleot_ray.config import DataSettings, RunSettings, load_yaml
from scaleot_ray.errors import ResourcesMissing
from scaleot_ray.federation.driver.placement import check_labels, check_places, check_sharing
from scaleot_ray.federation.driver.works import all_works
from scaleot_ray.federation.preflight import check_aggregation
from scaleot_ray.resources.needs import run_needs
from tests.cluster import manifests
from tests.cluster.manifests import FOLDER, GPU, Document, of_kind, pods
from tests.cluster.pins import IMAGE, RAY
from tests.cluster.sizes import SIZES
from tests.test_project import PYPROJECT


def problems(documents: list[Document]) -> list[str]:
    """All that is wrong."""
    found = [*manifests.wrong_kinds(documents), *manifests.wrong_versions(documents, IMAGE, RAY)]
    for check in (
        manifests.wrong_token,
        manifests.wrong_resources,
        manifests.wrong_user,
        manifests.wrong_storage,
        manifests.wrong_monitor,
    ):
        found += check(documents)
    for job in of_kind(documents, "RayJob"):
        found += manifests.wrong_job(job)
    return found


def test_there_are_a_cluster_with_three_groups_and_a_job() -> None:
    documents = manifests.load()
    (cluster,), (_,) = of_kind(documents, "RayCluster"), of_kind(documents, "RayJob")
    assert [pod.where for pod in pods([cluster])] == ["scaleot, head", "scaleot, cpu", "scaleot, gpu"]


def test_nothing_is_wrong() -> None:
    assert problems(manifests.load()) == []


def _head(documents: list[Document]) -> Any:
    return of_kind(documents, "RayCluster")[0]["spec"]["headGroupSpec"]["template"]["spec"]


def _gpu(documents: list[Document]) -> Any:
    return of_kind(documents, "RayCluster")[0]["spec"]["workerGroupSpecs"][1]


def _job(documents: list[Document]) -> Any:
    return of_kind(documents, "RayJob")[0]["spec"]


def _monitor(documents: list[Document]) -> Any:
    return of_kind(documents, "PodMonitor")[0]["spec"]


def _forget(of: dict[str, Any], key: str) -> None:
    del of[key]


BROKEN: dict[str, Callable[[list[Document]], Any]] = {
    "apiVersion ray.io/v1alpha1": lambda all: of_kind(all, "RayJob")[0].update(apiVersion="ray.io/v1alpha1"),
    "name Scaleot": lambda all: of_kind(all, "RayCluster")[0]["metadata"].update(name="Scaleot"),
    "no label app.kubernetes.io/component": lambda all: _forget(
        of_kind(all, "RayCluster")[0]["metadata"]["labels"], "app.kubernetes.io/component"
    ),
    "no queue": lambda all: _forget(of_kind(all, "RayJob")[0]["metadata"]["labels"], "kueue.x-k8s.io/queue-name"),
    "scaleot-run: rayVersion is not": lambda all: _job(all)["rayClusterSpec"].update(rayVersion="2.59.0"),
    "scaleot, gpu: image": lambda all: _gpu(all)["template"]["spec"]["containers"][0].update(image="scaleot:latest"),
    "no authentication by a token": lambda all: _forget(
        of_kind(all, "RayCluster")[0]["spec"]["authOptions"], "secretName"
    ),
    "has no authentication by token": lambda all: _job(all)["rayClusterSpec"].update(rayVersion="2.51.2"),
    "RAY_AUTH_TOKEN is written out": lambda all: _head(all)["containers"][0]["env"].append(
        {"name": "RAY_AUTH_TOKEN", "value": "0123"}
    ),
    "a Secret is written out": lambda all: all.append(
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "token", "labels": {}}}
    ),
    "a token of the Kubernetes API": lambda all: _forget(_head(all), "automountServiceAccountToken"),
    "requests are not limits": lambda all: _head(all)["containers"][0]["resources"]["requests"].update(cpu="1"),
    "no limit of cpu or memory": lambda all: [
        _forget(each, "memory") for each in _head(all)["containers"][0]["resources"].values()
    ],
    "no GPUs": lambda all: [
        _forget(each, GPU) for each in _gpu(all)["template"]["spec"]["containers"][0]["resources"].values()
    ],
    "is not placed on nodes with GPUs": lambda all: _forget(_gpu(all)["template"]["spec"], "tolerations"),
    "takes more than half of the memory": lambda all: of_kind(all, "RayCluster")[0]["spec"]["headGroupSpec"][
        "rayStartParams"
    ].update({"object-store-memory": str(48 << 30)}),
    "rayStartParams must be text": lambda all: _gpu(all)["rayStartParams"].update({"num-gpus": 1}),
    "KubeRay refuses labels": lambda all: _gpu(all)["rayStartParams"].update(labels="site=owner"),
    "scaleot, gpu: replicas": lambda all: _gpu(all).update(replicas=9),
    "may run as root": lambda all: _head(all)["securityContext"].update(runAsUser=0),
    "may become root": lambda all: _forget(_head(all)["containers"][0]["securityContext"], "allowPrivilegeEscalation"),
    "of the volumes": lambda all: _head(all)["containers"][0]["volumeMounts"].pop(),
    "nobody claims elsewhere": lambda all: _head(all)["volumes"][0].update(
        persistentVolumeClaim={"claimName": "elsewhere"}
    ),
    "no shared storage": lambda all: _head(all)["containers"][0]["volumeMounts"][0].update(mountPath="/data"),
    "a block device on a worker": lambda all: (
        _gpu(all)["template"]["spec"]["volumes"].append(_head(all)["volumes"][1]),
        _gpu(all)["template"]["spec"]["containers"][0]["volumeMounts"].append(
            {"name": "registry", "mountPath": "/var/lib/scaleot"}
        ),
    ),
    "no block device for the registry": lambda all: (
        _head(all)["volumes"].pop(),
        _head(all)["containers"][0]["volumeMounts"].pop(),
    ),
    "two heads share": lambda all: _job(all)["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["volumes"][
        1
    ].update(persistentVolumeClaim={"claimName": "scaleot-registry"}),
    "not Ray's": lambda all: _forget(_monitor(all)["selector"]["matchLabels"], "ray.io/is-ray-node"),
    "scaleot, head: the monitor does not see it": lambda all: _monitor(all)["selector"]["matchLabels"].update(
        {"app.kubernetes.io/component": "gpu-worker"}
    ),
    "another port": lambda all: _monitor(all)["podMetricsEndpoints"][0].update(port="dashboard"),
    "Kueue cannot hold it back": lambda all: _forget(_job(all), "suspend"),
    "its cluster stays": lambda all: _job(all).update(shutdownAfterJobFinishes=False),
    "it is not tried again": lambda all: _forget(_job(all), "backoffLimit"),
    "may be put on the head": lambda all: _forget(
        _job(all)["rayClusterSpec"]["headGroupSpec"]["rayStartParams"], "num-cpus"
    ),
    "clusterSelector": lambda all: _job(all).update(clusterSelector={"ray.io/cluster": "scaleot"}),
    "federated.py is not in the image": lambda all: _job(all).update(
        entrypoint="python /opt/scaleot/jobs/federated.py /shared/run.yaml"
    ),
    "/home/ray/run.yaml is not on the shared storage": lambda all: _job(all).update(
        entrypoint="python /opt/scaleot/jobs/federate.py /home/ray/run.yaml"
    ),
}


@pytest.mark.parametrize("complaint", BROKEN)
def test_a_broken_manifest_is_caught(complaint: str) -> None:
    documents = deepcopy(manifests.load())  # an alias in the YAML is one object in both places
    BROKEN[complaint](documents)
    assert any(complaint in problem for problem in problems(documents)), problems(documents)


def test_ray_is_one_the_package_takes_and_that_was_tried() -> None:
    (asked,) = (Requirement(line.strip(' ",')) for line in PYPROJECT.splitlines() if '"ray[default]' in line)
    assert RAY in asked.specifier
    assert Version("2.51.2") not in asked.specifier, "has no token authentication, which the guide begins with"
    assert Version(version("ray")) >= RAY, "no test has run with the Ray of the manifests"


@pytest.fixture(scope="module")
def job() -> Document:
    """The RayJob."""
    return of_kind(manifests.load(), "RayJob")[0]


@pytest.fixture(scope="module")
def run(job: Document) -> RunSettings:
    """Its settings, read like the job reads them."""
    name = shlex.split(job["spec"]["entrypoint"])[-1].rsplit("/", 1)[-1]
    return load_yaml(RunSettings, FOLDER / name)


def _paths(run: RunSettings) -> dict[str, str]:
    data: dict[str, DataSettings] = {"public": run.public}
    for tenant in run.tenants:
        data |= {f"{tenant.name}.train": tenant.train, f"{tenant.name}.test": tenant.test}
    return {"model": run.model.path, "output": run.output, **{key: each.path for key, each in data.items()}}


def test_the_jobs_settings_fit_together_and_lie_on_storage_that_stays(job: Document, run: RunSettings) -> None:
    check_aggregation(run)
    assert run.environment == "cluster"
    assert run.registry is not None
    assert list(manifests.wrong_places(job, _paths(run), run.registry)) == []
    assert len(run.tenants) >= 4
    assert run.rounds.count > 1


def test_settings_elsewhere_are_caught(job: Document, run: RunSettings) -> None:
    found = list(manifests.wrong_places(job, {**_paths(run), "output": "/tmp/run"}, "/shared/registry"))
    assert found == [
        "output: /tmp/run is not on the shared storage",
        "registry: /shared/registry is not on the block device",
    ]


def _look(run: RunSettings, job: Document) -> None:
    """Looks at the job's nodes as the run does before it starts, for a model of 7B parameters."""
    there, needs = manifests.nodes(job), run_needs(run, SIZES["7B"])
    check_labels(run, there)
    check_sharing(needs.emulator, there[0])
    check_places(all_works(run, needs), needs.emulator, there)


def test_the_jobs_nodes_have_what_its_settings_ask_for(job: Document, run: RunSettings) -> None:
    _look(run, job)
    assert [node.gpus for node in manifests.nodes(job)] == [0, 1, 1, 1]
    assert {label for tenant in run.tenants for label in tenant.node_labels.items()} == {("site", "tenants")}


def _limits(job: Document, group: int) -> Any:
    spec = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][group]["template"]["spec"]
    return spec["containers"][0]["resources"]["limits"]


LACKING: dict[str, Callable[[Document], Any]] = {
    r"shares the emulator from scaleot-run, head": lambda job: job["spec"]["rayClusterSpec"]["headGroupSpec"][
        "rayStartParams"
    ].update({"object-store-memory": str(8 << 30)}),
    r"placement\.owner_labels: no node of this cluster has site=owner": lambda job: _forget(
        job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0], "labels"
    ),
    r"tenants\.0\.node_labels: no node of this cluster has site=tenants": lambda job: job["spec"]["rayClusterSpec"][
        "workerGroupSpecs"
    ][1].update(labels={"site": "tenant"}),
    r"data owner alice asks for 8 processors, 1 GPUs": lambda job: _limits(job, 1).pop(GPU),
    r"data owner carol asks for .* 40\.0 GB of memory": lambda job: _limits(job, 1).update(memory="32Gi"),
    r"model owner asks for .* 44\.6 GB of memory": lambda job: _limits(job, 0).update(memory="40Gi"),
    r"scaleot-run, tenants, whose object store has 8\.6 GB": lambda job: job["spec"]["rayClusterSpec"][
        "workerGroupSpecs"
    ][1]["rayStartParams"].update({"object-store-memory": str(8 << 30)}),
}


@pytest.mark.parametrize("problem", LACKING)
def test_what_the_jobs_nodes_lack_is_caught(job: Document, run: RunSettings, problem: str) -> None:
    lacking = deepcopy(job)
    LACKING[problem](lacking)
    with pytest.raises(ResourcesMissing, match=problem):
        _look(run, lacking)
