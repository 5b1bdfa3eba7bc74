"""What must hold of the KubeRay manifests in ``cluster/kuberay``: a function for each matter tells what is wrong."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from packaging.version import Version

from scaleot_ray.resources.nodes import Node
from tests.cli.command import PROJECT

FOLDER = PROJECT / "cluster" / "kuberay"
GPU = "nvidia.com/gpu"
TOKEN_AUTHENTICATION = Version("2.52.0")
"""The first Ray that KubeRay lets authenticate by token."""

_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_QUANTITY = re.compile(r"(\d+)(Mi|Gi)?")

Document = dict[str, Any]


@dataclass(frozen=True)
class Pod:
    """A pod of a Ray cluster.

    Attributes:
        where: document and group, for messages.
        group: the group's spec.
    """

    where: str
    group: Document

    @property
    def head(self) -> bool:
        """Whether it is the head."""
        return "groupName" not in self.group

    @property
    def spec(self) -> Document:
        """The pod's own spec."""
        return dict(self.group["template"]["spec"])

    @property
    def container(self) -> Document:
        """The container that Ray runs in: KubeRay takes the first."""
        return dict(self.spec["containers"][0])

    @property
    def claims(self) -> dict[str, str]:
        """Claims of what is mounted in it, by path."""
        volumes = {each["name"]: each["persistentVolumeClaim"]["claimName"] for each in self.spec["volumes"]}
        return {mount["mountPath"]: volumes[mount["name"]] for mount in self.container["volumeMounts"]}


def load() -> list[Document]:
    """Every Kubernetes document there is; the settings of the run are none."""
    found = []
    for path in sorted(FOLDER.glob("*.yaml")):
        found += [document for document in yaml.safe_load_all(path.read_text()) if "kind" in document]
    return found


def of_kind(documents: list[Document], kind: str) -> list[Document]:
    """The documents of a kind."""
    return [document for document in documents if document["kind"] == kind]


def clusters(documents: list[Document]) -> Iterator[tuple[str, Document]]:
    """Name and spec of each Ray cluster, also of one that a job brings."""
    for document in of_kind(documents, "RayCluster"):
        yield document["metadata"]["name"], document["spec"]
    for document in of_kind(documents, "RayJob"):
        yield document["metadata"]["name"], document["spec"]["rayClusterSpec"]


def pods(documents: list[Document]) -> list[Pod]:
    """The pods of each Ray cluster."""
    found = []
    for name, spec in clusters(documents):
        found.append(Pod(f"{name}, head", spec["headGroupSpec"]))
        found += [Pod(f"{name}, {group['groupName']}", group) for group in spec.get("workerGroupSpecs", [])]
    return found


def wrong_kinds(documents: list[Document]) -> Iterator[str]:
    """Kinds, versions of the API, names, labels."""
    versions = {"RayCluster": "ray.io/v1", "RayJob": "ray.io/v1", "PersistentVolumeClaim": "v1", "Pod": "v1"}
    versions["PodMonitor"] = "monitoring.coreos.com/v1"
    for document in documents:
        kind, metadata = document["kind"], document["metadata"]
        if document["apiVersion"] != versions.get(kind):
            yield f"{kind}: apiVersion {document['apiVersion']}"
        # KubeRay makes longer names of it, which must be DNS labels.
        if not _NAME.fullmatch(metadata["name"]) or len(metadata["name"]) > 47:
            yield f"{kind}: name {metadata['name']}"
        labels = [metadata["labels"]]
        labels += [pod.group["template"]["metadata"]["labels"] for pod in pods([document])] if "Ray" in kind else []
        for each in labels:
            missing = {f"app.kubernetes.io/{key}" for key in ("name", "part-of", "component")} - each.keys()
            if missing:
                yield f"{metadata['name']}: no label {', '.join(sorted(missing))}"
        if "Ray" in kind and "kueue.x-k8s.io/queue-name" not in metadata["labels"]:
            yield f"{metadata['name']}: no queue"


def wrong_versions(documents: list[Document], image: str, ray: Version) -> Iterator[str]:
    """One image and one version of Ray everywhere."""
    for name, spec in clusters(documents):
        if Version(spec.get("rayVersion", "0")) != ray:
            yield f"{name}: rayVersion is not {ray}"
    for pod in pods(documents):
        if pod.container["image"] != image:
            yield f"{pod.where}: image {pod.container['image']}"


def wrong_token(documents: list[Document]) -> Iterator[str]:
    """Token authentication, the token from a Secret and nowhere else."""
    for name, spec in clusters(documents):
        options = spec.get("authOptions", {})
        if options.get("mode") != "token" or not options.get("secretName"):
            yield f"{name}: no authentication by a token from a Secret"
        if Version(spec.get("rayVersion", "0")) < TOKEN_AUTHENTICATION:
            yield f"{name}: Ray {spec.get('rayVersion')} has no authentication by token"
    for pod in pods(documents):
        for variable in pod.container.get("env", []):
            if re.search("TOKEN|PASSWORD|SECRET|KEY", variable["name"]) and "value" in variable:
                yield f"{pod.where}: {variable['name']} is written out"
        if pod.spec.get("automountServiceAccountToken") is not False:
            yield f"{pod.where}: jobs get a token of the Kubernetes API"
    if of_kind(documents, "Secret"):
        yield "a Secret is written out"


def wrong_resources(documents: list[Document]) -> Iterator[str]:
    """Requests equal limits; GPUs where the group says so; object store below memory; fixed sizes; labels."""
    for pod in pods(documents):
        resources = pod.container["resources"]
        if resources["requests"] != resources["limits"]:
            yield f"{pod.where}: requests are not limits"
        limits = resources["limits"]
        if {"cpu", "memory"} - limits.keys():
            yield f"{pod.where}: no limit of cpu or memory"
            continue
        if pod.group.get("groupName") == "gpu" and int(limits.get(GPU, 0)) < 1:
            yield f"{pod.where}: no GPUs"
        if GPU in limits:
            tolerated = {each["key"] for each in pod.spec.get("tolerations", [])}
            if GPU not in tolerated or not pod.spec.get("nodeSelector"):
                yield f"{pod.where}: is not placed on nodes with GPUs"
        store = int(pod.group["rayStartParams"].get("object-store-memory", 0))
        if store > bytes_of(limits["memory"]) // 2:
            yield f"{pod.where}: the object store takes more than half of the memory"
        if any(not isinstance(value, str) for value in pod.group["rayStartParams"].values()):
            yield f"{pod.where}: rayStartParams must be text"
        if "labels" in pod.group["rayStartParams"]:
            yield f"{pod.where}: KubeRay refuses labels in rayStartParams"
        if not pod.head and not pod.group["minReplicas"] <= pod.group["replicas"] <= pod.group["maxReplicas"]:
            yield f"{pod.where}: replicas"


def wrong_user(documents: list[Document]) -> Iterator[str]:
    """Nobody is root, or becomes it."""
    for pod in pods(documents):
        user, container = pod.spec.get("securityContext", {}), pod.container.get("securityContext", {})
        if not user.get("runAsNonRoot") or not user.get("runAsUser"):
            yield f"{pod.where}: may run as root"
        if container.get("allowPrivilegeEscalation") is not False:
            yield f"{pod.where}: may become root"


def wrong_storage(documents: list[Document]) -> Iterator[str]:
    """Mounts name volumes, volumes claims; the shared one is on every pod, a registry's on one head."""
    claims = {
        each["metadata"]["name"]: each["spec"]["accessModes"] for each in of_kind(documents, "PersistentVolumeClaim")
    }
    single: list[str] = []
    for pod in pods(documents):
        names = {volume["name"] for volume in pod.spec["volumes"]}
        mounted = {mount["name"] for mount in pod.container["volumeMounts"]}
        if names != mounted:
            yield f"{pod.where}: mounts {sorted(mounted)} of the volumes {sorted(names)}"
            continue
        unknown = set(pod.claims.values()) - claims.keys()
        if unknown:
            yield f"{pod.where}: nobody claims {', '.join(sorted(unknown))}"
            continue
        if "ReadWriteMany" not in claims.get(pod.claims.get("/shared", ""), []):
            yield f"{pod.where}: no shared storage at /shared"
        own = [claim for claim in pod.claims.values() if claims[claim] == ["ReadWriteOnce"]]
        if own and not pod.head:
            yield f"{pod.where}: a block device on a worker"
        if pod.head and not own:
            yield f"{pod.where}: no block device for the registry"
        single += own
    if len(set(single)) < len(single):
        yield "two heads share a block device"


def wrong_monitor(documents: list[Document]) -> Iterator[str]:
    """A PodMonitor that chooses every pod, by the labels of the manifests and of KubeRay, and its port of that name."""
    for monitor in of_kind(documents, "PodMonitor"):
        wanted = dict(monitor["spec"]["selector"]["matchLabels"])
        if wanted.pop("ray.io/is-ray-node", None) != "yes":
            yield "the monitor looks at pods that are not Ray's"
        for pod in pods(documents):
            if not wanted.items() <= pod.group["template"]["metadata"]["labels"].items():
                yield f"{pod.where}: the monitor does not see it"
        if [endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]] != ["metrics"]:
            yield "the monitor looks at another port"


def wrong_job(document: Document) -> Iterator[str]:
    """A RayJob that Kueue may hold back, that is tried again and that clears away its cluster."""
    spec = document["spec"]
    if spec.get("suspend") is not True:
        yield "Kueue cannot hold it back"
    if not spec.get("shutdownAfterJobFinishes") or spec.get("ttlSecondsAfterFinished", 0) <= 0:
        yield "its cluster stays, or goes at once"
    if spec.get("backoffLimit", 0) < 1:
        yield "it is not tried again"
    if "clusterSelector" in spec:
        yield "clusterSelector goes neither with suspend nor with backoffLimit"
    command, script, config = shlex.split(spec["entrypoint"])
    if command != "python" or not _script(script).is_file():
        yield f"{script} is not in the image"
    head = pods([document])[0]
    if mount_of(config, head.claims) != "/shared":
        yield f"{config} is not on the shared storage"
    if head.group["rayStartParams"].get("num-cpus") != "0":
        yield "parts of the run may be put on the head"


def wrong_places(document: Document, paths: dict[str, str], registry: str) -> Iterator[str]:
    """Whether what a run reads and writes lies on storage that stays.

    Args:
        document: the RayJob.
        paths: the run's paths, by key.
        registry: the setting.
    """
    head, *workers = pods([document])
    for key, path in paths.items():
        if any(mount_of(path, pod.claims) != "/shared" for pod in (head, *workers)):
            yield f"{key}: {path} is not on the shared storage"
    place = mount_of(registry, head.claims)
    if place in (None, "/shared"):
        yield f"registry: {registry} is not on the block device"


def nodes(document: Document) -> list[Node]:
    """The nodes of a RayJob's cluster, with what KubeRay tells Ray that each has."""
    found = []
    for pod in pods([document]):
        limits, parameters = pod.container["resources"]["limits"], pod.group["rayStartParams"]
        cpus, gpus = float(parameters.get("num-cpus", limits["cpu"])), float(limits.get(GPU, 0))
        memory, store = bytes_of(limits["memory"]), int(parameters["object-store-memory"])
        node = Node(pod.where, pod.where, pod.group.get("labels", {}), cpus, gpus, memory, store, cpus, gpus, memory)
        found += [node] * pod.group.get("replicas", 1)
    return found


def mount_of(path: str, claims: dict[str, str]) -> str | None:
    """The mounted folder that a path lies in."""
    return next((mount for mount in claims if path.startswith(f"{mount}/")), None)


def bytes_of(quantity: str) -> int:
    """Bytes of a quantity such as ``64Gi``."""
    found = _QUANTITY.fullmatch(quantity)
    assert found is not None, quantity
    return int(found.group(1)) << {None: 0, "Mi": 20, "Gi": 30}[found.group(2)]


def _script(path: str) -> Path:
    """The checkout's file that the image has at a path."""
    return PROJECT / path.removeprefix("/opt/scaleot/")
