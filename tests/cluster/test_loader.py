"""The pod that puts models, data and settings on the shared storage: it is enough for that, and no more than that."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest

from tests.cluster import manifests
from tests.cluster.manifests import GPU, Document, Pod, of_kind, pods
from tests.cluster.pins import IMAGE


def wrong_loader(document: Document, others: list[Pod]) -> Iterator[str]:
    """What is wrong of it: beside the pods of the cluster and the job, whose storage it is for."""
    pod = Pod("loader", {"groupName": "loader", "template": document})
    head = next(other for other in others if other.head)
    if pod.container["image"] != IMAGE:
        yield f"image {pod.container['image']}"
    if pod.claims != {"/shared": head.claims["/shared"]}:
        yield f"mounts {pod.claims}"
    user = pod.spec.get("securityContext", {})
    if user != head.spec["securityContext"]:
        yield "what it writes belongs to another user"
    if pod.container.get("securityContext") != head.container["securityContext"]:
        yield "may become root"
    if pod.spec.get("automountServiceAccountToken") is not False:
        yield "gets a token of the Kubernetes API"
    if GPU in pod.container["resources"]["limits"]:
        yield "takes a GPU"
    if pod.container["resources"]["requests"] != pod.container["resources"]["limits"]:
        yield "requests are not limits"
    if not pod.spec.get("activeDeadlineSeconds"):
        yield "stays for ever"


@pytest.fixture
def documents() -> list[Document]:
    """All manifests, for this test alone."""
    return deepcopy(manifests.load())


def _loader(documents: list[Document]) -> Any:
    (pod,) = of_kind(documents, "Pod")
    return pod


def test_nothing_is_wrong_of_it(documents: list[Document]) -> None:
    assert list(wrong_loader(_loader(documents), pods(documents))) == []


BROKEN: dict[str, Callable[[Any, Any], Any]] = {
    "image busybox": lambda spec, container: container.update(image="busybox"),
    "mounts {'/data'": lambda spec, container: container["volumeMounts"][0].update(mountPath="/data"),
    "another user": lambda spec, container: spec["securityContext"].update(runAsUser=0),
    "may become root": lambda spec, container: container.pop("securityContext"),
    "a token of the Kubernetes API": lambda spec, container: spec.pop("automountServiceAccountToken"),
    "takes a GPU": lambda spec, container: container["resources"]["limits"].update({GPU: "1"}),
    "requests are not limits": lambda spec, container: container["resources"]["requests"].update(cpu="2"),
    "stays for ever": lambda spec, container: spec.pop("activeDeadlineSeconds"),
}


@pytest.mark.parametrize("complaint", BROKEN)
def test_a_broken_loader_is_caught(documents: list[Document], complaint: str) -> None:
    loader = _loader(documents)
    BROKEN[complaint](loader["spec"], loader["spec"]["containers"][0])
    assert any(complaint in problem for problem in wrong_loader(loader, pods(documents)))
