"""The nodes of the connected Ray: what each has in all, and what is free there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray
import ray._private.state

_GB = 1e9


@dataclass(frozen=True)
class Node:
    """A node that lives.

    Attributes:
        id: Ray's.
        address: its IP.
        labels: as ``ray start --labels`` gave them, and Ray's own.
        cpus, gpus: in all.
        memory, object_store: bytes in all.
        free_cpus, free_gpus, free_memory: what no one has claimed.
    """

    id: str
    address: str
    labels: Mapping[str, str]
    cpus: float
    gpus: float
    memory: int
    object_store: int
    free_cpus: float
    free_gpus: float
    free_memory: int

    def has_labels(self, wanted: Mapping[str, str]) -> bool:
        """Whether it has all of these."""
        return wanted.items() <= self.labels.items()


def living_nodes() -> list[Node]:
    """Every node that lives, this one first."""
    here = ray.get_runtime_context().get_node_id()
    free = ray._private.state.available_resources_per_node()
    nodes = [_node(entry, free.get(entry["NodeID"], {})) for entry in ray.nodes() if entry["Alive"]]
    return sorted(nodes, key=lambda node: (node.id != here, node.address, node.id))


def what_nodes_have(nodes: Sequence[Node]) -> str:
    """What each has and what is free there, in words."""
    each = [
        f"{node.address} has {node.cpus:g} processors ({node.free_cpus:g} free), {node.gpus:g} GPUs "
        f"({node.free_gpus:g} free), {node.memory / _GB:.1f} GB ({node.free_memory / _GB:.1f} free)"
        for node in nodes
    ]
    return "; ".join(each) or "the cluster has no node"


def _node(entry: Mapping[str, dict[str, float]], free: Mapping[str, float]) -> Node:
    there = entry["Resources"]
    return Node(
        str(entry["NodeID"]),
        str(entry["NodeManagerAddress"]),
        {str(key): str(value) for key, value in entry.get("Labels", {}).items()},
        there.get("CPU", 0.0),
        there.get("GPU", 0.0),
        int(there.get("memory", 0)),
        int(there.get("object_store_memory", 0)),
        free.get("CPU", 0.0),
        free.get("GPU", 0.0),
        int(free.get("memory", 0)),
    )
