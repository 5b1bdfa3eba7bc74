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
from scaleot_ray.federation.machine import Machine
from scaleot_ray.federation.preflight import check_aggregation, check_processors
from tests.cluster import manifests
from tests.cluster.manifests import FOLDER, GPU, Document, of_kind, pods
from tests.cluster.pins import IMAGE, RAY
from tests.test_project import PYPROJECT


def problems(documents: list[Document]) -> list[str]:
    """All that is wrong."""
    found = [*manifests.wrong_kinds(documents), *manifests.wrong_versions(documents, IMAGE, RAY)]
    for check in (manifests.wrong_token, manifests.wrong_resources, manifests.wrong_user, manifests.wrong_storage):
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
    "Kueue cannot hold it back": lambda all: _forget(_job(all), "suspend"),
    "its cluster stays": lambda all: _job(all).update(shutdownAfterJobFinishes=False),
    "it is not tried again": lambda all: _forget(_job(all), "backoffLimit"),
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


def test_the_jobs_pod_has_what_its_settings_ask_for(job: Document, run: RunSettings) -> None:
    limits = pods([job])[0].container["resources"]["limits"]
    cpus, gpus = int(limits["cpu"]), int(limits[GPU])
    check_processors(run, Machine(cpus, gpus, 0, None))
    assert run.tenants_at_once is not None
    largest = sorted((tenant.gpus for tenant in run.tenants), reverse=True)[: run.tenants_at_once]
    assert sum(largest) <= gpus
    assert sum(sorted((tenant.cpus for tenant in run.tenants), reverse=True)[: run.tenants_at_once]) <= cpus
