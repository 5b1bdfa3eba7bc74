"""On a cluster, Ray finds the node for each part of a run: one placement group for each, and a limit to waiting.

A part claims processors, GPUs and memory together before its actor starts, on a node with the labels
that it asks for. So parts of several runs, and other users of the cluster, wait for one another instead of
sharing what is not there, and an autoscaler sees what is missing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from scaleot_ray.artifacts.audit import tenant_of
from scaleot_ray.config import RunSettings
from scaleot_ray.errors import ResourcesMissing
from scaleot_ray.federation.driver.schedule import Work
from scaleot_ray.progress import OnProgress, Progress
from scaleot_ray.resources.nodes import Node, living_nodes, what_nodes_have

SAY_SECONDS = 10.0
"""A wait for room longer than this is told of."""

NODES_SECONDS = 10.0
"""So long what was found of the nodes is taken as true; what is possible is asked several times a second."""

_GB = 1e9


@dataclass(eq=False)
class _Seat:
    work: Work
    group: PlacementGroup
    taken: bool = False  # its place was found, its work began
    asked: float = field(default_factory=time.monotonic)
    said: bool = False


class Placement:
    """What of a run has a place on the cluster, and what waits for one; a context manager that gives all back.

    Args:
        timeout: seconds without any part at work after which one that waits is given up.
        on_progress: hears who waits.
        autoscaling: nodes may come that are larger than those there are.
    """

    def __init__(self, timeout: float, on_progress: OnProgress | None, autoscaling: bool = False) -> None:
        self._timeout, self._on_progress, self._autoscaling = timeout, on_progress, autoscaling
        self._nodes, self._looked = list[Node](), -NODES_SECONDS
        self._seats: dict[str, _Seat] = {}
        self._busy = time.monotonic()  # when something was last at work

    def __enter__(self) -> Placement:
        return self

    def __exit__(self, *_: object) -> None:
        for role in list(self._seats):
            self.over(role)

    def start(self, possible: Callable[[], Sequence[Work]]) -> None:
        """Asks for a place for everything possible, and begins what has found one.

        What is possible is asked anew after each, since one that waits for its place may rule out others.

        Raises:
            ResourcesMissing: nothing works, and a part that the run cannot do without has found no place for too
                long; names who waits for what, and what the nodes have.
        """
        while (work := next((one for one in possible() if not self.has(one.role)), None)) is not None:
            self._seats[work.role] = _Seat(work, _group(work))
        for seat in [seat for seat in self._seats.values() if not seat.taken]:
            if placement_group_table(seat.group)["state"] == "CREATED":
                seat.taken = True
                self._told(seat, 1)
                seat.work.begin()
        self._look()

    def fits(self, work: Work) -> bool:
        """Whether some node would have room for it, did nothing else work; with autoscaling one may turn up."""
        if self._autoscaling:
            return True
        if time.monotonic() - self._looked >= NODES_SECONDS:
            self._nodes, self._looked = living_nodes(), time.monotonic()
        return any(_has_room(node, work) for node in self._nodes)

    def has(self, role: str) -> bool:
        """Whether this part works, or waits for its place."""
        return role in self._seats

    def over(self, role: str) -> None:
        """This part has ended, if there was any: what it claimed is free again."""
        seat = self._seats.pop(role, None)
        if seat is not None:
            self._told(seat, 1)
            remove_placement_group(seat.group)

    def place(self, role: str) -> PlacementGroupSchedulingStrategy:
        """Where the actor of a part that begins goes."""
        return PlacementGroupSchedulingStrategy(self._seats[role].group)

    def _look(self) -> None:
        now, waiting = time.monotonic(), [seat for seat in self._seats.values() if not seat.taken]
        if len(waiting) < len(self._seats) or not waiting:
            self._busy = now
            return
        for seat in waiting:
            # While nothing of ours works, others hold what it waits for, or it is not there.
            if not seat.said and now - max(self._busy, seat.asked) > SAY_SECONDS:
                seat.said = True
                self._told(seat, 0)
        first = min(waiting, key=lambda seat: seat.asked)
        if now - max(self._busy, first.asked) > self._timeout:
            problem = ResourcesMissing(
                f"{first.work.role} found no place on the cluster within {self._timeout:g} seconds: it asks for "
                f"{described(first.work)} on one node; {what_nodes_have(living_nodes())}.",
                "Run the same command again when others have ended (`ray status` shows what is taken), raise "
                "placement.timeout, or ask for less (owner_cpus, tenants.N.cpus, tenants.N.gpus, tenants.N.memory_gb). "
                "What is finished is reused.",
            )
            if first.work.no_place is None:
                raise problem
            first.work.no_place(problem)
            self.over(first.work.role)

    def _told(self, seat: _Seat, step: int) -> None:
        if seat.said and self._on_progress is not None:
            stage, tenant = f"{seat.work.role} waits for {described(seat.work)}", tenant_of(seat.work.role)
            self._on_progress(Progress(stage, step, 1, tenant=tenant))


def check_labels(settings: RunSettings, nodes: Sequence[Node]) -> None:
    """Whether some node has the labels that each party asks for.

    Raises:
        ResourcesMissing: none has; names the key and what labels the nodes have.
    """
    asked = {"placement.owner_labels": settings.placement.owner_labels}
    asked |= {f"tenants.{index}.node_labels": tenant.node_labels for index, tenant in enumerate(settings.tenants)}
    for key, labels in asked.items():
        if not any(node.has_labels(labels) for node in nodes):
            wanted = ",".join(f"{name}={value}" for name, value in labels.items())
            raise ResourcesMissing(
                f"{key}: no node of this cluster has {wanted}; {_labels(nodes)}.",
                f"Start the node with `ray start --labels {wanted}`, or change {key}; with an autoscaler, set "
                "placement.autoscaling.",
            )


def check_places(works: Sequence[Work], emulator: int, nodes: Sequence[Node]) -> None:
    """Whether each part would fit on some node, were it alone there beside the emulator in shared memory.

    Args:
        works: the parts.
        emulator: its bytes, at most.
        nodes: those that live.

    Raises:
        ResourcesMissing: one would wait for ever; names it, what it asks for, and what the nodes have.
    """
    for work in works:
        able = [node for node in nodes if node.has_labels(work.labels)]
        if not any(_has_room(node, work) for node in able):
            raise ResourcesMissing(
                f"{work.role} asks for {described(work)} on one node, and no node"
                f"{' with its labels' if work.labels else ''} has that; {what_nodes_have(able)}.",
                "Ask for less (owner_cpus, owner_gpus, tenants.N.cpus, tenants.N.gpus, tenants.N.memory_gb), add a "
                "larger node, or with an autoscaler set placement.autoscaling.",
            )
        small = [node for node in able if _has_room(node, work) and node.object_store < emulator]
        if small:
            raise ResourcesMissing(
                f"{work.role} may be put on {small[0].address}, whose object store has "
                f"{small[0].object_store / _GB:.1f} GB; the emulator takes up to {emulator / _GB:.1f} GB of it.",
                "Start that node with a larger one (`ray start --object-store-memory`), or keep it out by labels "
                "(tenants.N.node_labels, placement.owner_labels).",
            )


def check_sharing(emulator: int, here: Node) -> None:
    """Whether the node that a run is led from can share the emulator out of its memory.

    Ray would put one that is too large for it into files, and say nothing.

    Args:
        emulator: its bytes, at most.
        here: that node.

    Raises:
        ResourcesMissing: its object store is too small.
    """
    if here.object_store < emulator:
        raise ResourcesMissing(
            f"the coordinator shares the emulator from {here.address}, the node of this job, whose object store has "
            f"{here.object_store / _GB:.1f} GB; the emulator takes up to {emulator / _GB:.1f} GB of it.",
            "Start that node with a larger one (`ray start --object-store-memory`), or set model.dtype to bfloat16.",
        )


def described(work: Work) -> str:
    """What a part asks for, in words."""
    parts = [f"{work.cpus:g} processors"] + ([f"{work.gpus:g} GPUs"] if work.gpus else [])
    return ", ".join([*parts, f"{work.memory / _GB:.1f} GB of memory"])


def _has_room(node: Node, work: Work) -> bool:
    """Whether a part would fit on a node, were it alone there."""
    there = work.cpus <= node.cpus and work.gpus <= node.gpus and work.memory <= node.memory
    return there and node.has_labels(work.labels)


def _labels(nodes: Sequence[Node]) -> str:
    each = []
    for node in nodes:
        own = ",".join(f"{key}={value}" for key, value in sorted(node.labels.items()) if not key.startswith("ray.io/"))
        each.append(f"{node.address} has {own or 'none'}")
    return "; ".join(each) or "the cluster has no node"


def _group(work: Work) -> PlacementGroup:
    claims = _claims(work)
    labels: Mapping[str, Any] = work.labels
    return placement_group(
        [claims], strategy="STRICT_PACK", name=f"scaleot {work.role}", bundle_label_selector=[dict(labels)]
    )


def _claims(work: Work) -> dict[str, float]:
    claims: dict[str, float] = {"CPU": work.cpus, "memory": float(work.memory)}
    return claims | ({"GPU": work.gpus} if work.gpus else {})
