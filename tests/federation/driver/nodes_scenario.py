"""Runs on a cluster of several raylets on this machine, in a process of its own.

    python -m tests.federation.driver.nodes_scenario FOLDER '[{"settings": {}, "kill": true}]'

The head has one processor; two nodes have two each, and the labels ``site=alice`` and ``site=bob``, both
``disk=shared``. Prints one JSON object per run: the report or the error, on which nodes its actors were, and
on which nodes copies of the emulator lay when all data owners tuned. ``kill`` then ends the node of the
first one.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import ray._private.state
import ray.experimental
from ray.cluster_utils import Cluster

from scaleot_ray.errors import ScaleOTError
from scaleot_ray.federation.run import run_local
from scaleot_ray.progress import Progress, TenantState
from tests.tiny_run import write_tiny_run

STORE = 100 << 20
SITES = ("alice", "bob")


class Sites:
    """A cluster: the head, and a node for each site."""

    def __init__(self) -> None:
        head = {"num_cpus": 1, "object_store_memory": STORE, "include_dashboard": False}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self._nodes: dict[str, Any] = {}
        ray.init(address=self._cluster.address, log_to_driver=False, logging_level="ERROR")
        self._names: dict[str, str] = {}
        self.complete()

    def complete(self) -> None:
        """Starts the nodes that are not there, or not any more."""
        for site in set(SITES) - self._nodes.keys():
            labels = {"site": site, "disk": "shared"}
            self._nodes[site] = self._cluster.add_node(num_cpus=2, object_store_memory=STORE, labels=labels)
        self._names |= {entry["NodeID"]: entry["Labels"].get("site", "head") for entry in ray.nodes()}

    def actors(self) -> dict[str, set[str]]:
        """Sites of the actors that live, by class."""
        found: dict[str, set[str]] = {}
        for actor in ray._private.state.actors().values():
            if actor["State"] == "ALIVE":
                found.setdefault(actor["ActorClassName"], set()).add(self._names[actor["Address"]["NodeID"]])
        return found

    def copies(self) -> list[str]:
        """Where copies of the shared emulator lie."""
        (name,) = ray.util.list_named_actors(all_namespaces=True)
        coordinator = ray.get_actor(name["name"], name["namespace"])
        (reference,) = ray.get(coordinator.emulator.remote())
        locations = ray.experimental.get_object_locations([reference])[reference]
        return sorted(self._names[node] for node in locations["node_ids"])

    def kill(self, site: str) -> None:
        """Ends a node as a power failure would."""
        self._cluster.remove_node(self._nodes.pop(site), allow_graceful=False)

    def close(self) -> None:
        """Ends the cluster."""
        ray.shutdown()
        self._cluster.shutdown()


def often(look: Callable[[], None]) -> Callable[[], None]:
    """Looks several times a second; gives what ends that."""
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.2):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()

    def end() -> None:
        stop.set()
        thread.join()

    return end


def run_once(folder: Path, sites: Sites, scenario: dict[str, Any]) -> dict[str, Any]:
    """One run.

    Args:
        folder: of the model, the data and the runs.
        sites: the cluster.
        scenario: changes to the ``settings``, ``labels`` by data owner, how many ``tenants``, and ``kill``.
    """
    sites.complete()
    settings = write_tiny_run(folder, environment="cluster", **scenario.get("settings", {}))
    tenants = [
        tenant.model_copy(update={"node_labels": scenario.get("labels", {}).get(tenant.name, {})})
        for tenant in settings.tenants[: scenario.get("tenants")]
    ]
    settings = settings.model_copy(update={"tenants": tuple(tenants)})
    seen: dict[str, set[str]] = {}
    copies: list[list[str]] = []
    killed: list[str] = []
    said: list[str] = []

    def look() -> None:
        for kind, places in sites.actors().items():
            seen.setdefault(kind, set()).update(places)

    def on_progress(progress: Progress) -> None:
        if progress.stage not in said:
            said.append(progress.stage)
        if not progress.stage.startswith("tune "):
            return
        if copies or len([stage for stage in said if stage.startswith("tune ")]) < len(tenants):
            return
        copies.append(sites.copies())
        if scenario.get("kill"):
            places = sites.actors()["DataOwner"]
            killed.append("alice" if len(places) > 1 else next(iter(places)))
            sites.kill(killed[0])

    def on_state(told: TenantState) -> None:
        said.append(f"{told.tenant} {told.reason}")

    end, begun = often(look), time.monotonic()
    try:
        result: dict[str, Any] = {"report": run_local(settings, on_progress=on_progress, on_state=on_state).as_json()}
    except ScaleOTError as error:
        result = {"error": type(error).__name__, "problem": error.problem, "remedy": error.remedy}
    end()
    groups = {group["state"] for group in ray.util.placement_group_table().values()}
    return {
        **result,
        "seconds": time.monotonic() - begun,
        "actors": {kind: sorted(places) for kind, places in seen.items()},
        "copies": copies[0] if copies else [],
        "killed": killed,
        "placement_groups": sorted(groups),
        "said": said,
        "log": (Path(settings.output) / "run.log").read_text().splitlines(),
    }


if __name__ == "__main__":
    there = Sites()
    for one in json.loads(sys.argv[2]):
        print(json.dumps(run_once(Path(sys.argv[1]), there, one)), flush=True)
    there.close()
