"""The files for Ray's cluster launcher: valid by Ray's own schema, with token authentication, one version of all."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from packaging.version import Version
from ray.autoscaler._private.util import prepare_config, validate_config

from scaleot_ray import __version__
from tests.cli.command import PROJECT
from tests.cluster.pins import IMAGE, RAY

FILES = {path.stem: path for path in (PROJECT / "cluster").glob("*.yaml")}
SCHEMA = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())


def config(name: str) -> dict[str, Any]:
    """A file's values."""
    values = yaml.safe_load(FILES[name].read_text())
    assert isinstance(values, dict)
    return values


def without_token(values: dict[str, Any]) -> list[str]:
    """Why a node might start without the token, or show it."""
    found = []
    if not any(place.endswith("/.ray/auth_token") for place in values.get("file_mounts", {})):
        found.append("the token is not brought to the nodes")
    contained = any("RAY_AUTH_MODE=token" in each for each in values.get("docker", {}).get("run_options", []))
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [command for command in values.get(key, []) if "ray start" in command]
        if len(starts) != 1:
            found.append(f"{key} starts {len(starts)} nodes")
        elif not contained and "RAY_AUTH_MODE=token" not in starts[0]:
            found.append(f"{key} does not ask for the token")
    if re.search(r"RAY_AUTH_TOKEN=", str(values)):
        found.append("the token is written out")
    if any("dashboard-host=0.0.0.0" in command for command in values.get("head_start_ray_commands", [])):
        found.append("the dashboard listens to everyone")
    return found


def without_labels(values: dict[str, Any]) -> list[str]:
    """Kinds of workers that no setting of a run could name."""
    if values["provider"]["type"] == "local":  # Ray gives labels of node types to machines of a cloud alone
        starts = [each for each in values["worker_start_ray_commands"] if "ray start" in each]
        return [each for each in starts if "--labels" not in each]
    types = values["available_node_types"].items()
    return [name for name, kind in types if name != values["head_node_type"] and not kind.get("labels")]


def test_one_for_machines_of_ones_own_and_one_for_a_cloud() -> None:
    assert {name: config(name)["provider"]["type"] for name in FILES} == {"on_premises": "local", "aws": "aws"}


@pytest.mark.parametrize("name", FILES)
def test_ray_takes_it(name: str) -> None:
    values = config(name)
    jsonschema.validate(values, SCHEMA)
    validate_config(prepare_config(copy.deepcopy(values)))


@pytest.mark.parametrize("name", FILES)
def test_an_unknown_key_is_caught(name: str) -> None:
    with pytest.raises(jsonschema.ValidationError, match="min_workers"):
        jsonschema.validate({**config(name), "min_workers": 2}, SCHEMA)


@pytest.mark.parametrize("name", FILES)
def test_nodes_start_with_the_token(name: str) -> None:
    assert without_token(config(name)) == []


@pytest.mark.parametrize("name", FILES)
def test_a_node_without_the_token_is_caught(name: str) -> None:
    values = config(name)
    values["file_mounts"] = {}
    values.get("docker", {})["run_options"] = ["--env=RAY_AUTH_TOKEN=0123"]
    values["head_start_ray_commands"] = ["RAY_AUTH_TOKEN=0123 ray start --head --dashboard-host=0.0.0.0"]
    values["worker_start_ray_commands"] = ["ray stop"]
    assert set(without_token(values)) == {
        "the token is not brought to the nodes",
        "head_start_ray_commands does not ask for the token",
        "worker_start_ray_commands starts 0 nodes",
        "the token is written out",
        "the dashboard listens to everyone",
    }


@pytest.mark.parametrize("name", FILES)
def test_workers_have_labels(name: str) -> None:
    assert without_labels(config(name)) == []


def test_a_worker_without_labels_is_caught() -> None:
    cloud, own = config("aws"), config("on_premises")
    del cloud["available_node_types"]["gpu_worker"]["labels"]
    own["worker_start_ray_commands"] = ["ray start --address=$RAY_HEAD_IP:6379"]
    assert without_labels(cloud) == ["gpu_worker"]
    assert without_labels(own) == own["worker_start_ray_commands"]


def test_versions_are_those_of_the_image() -> None:
    assert config("aws")["docker"]["image"] == IMAGE
    (installs,) = (command for command in config("on_premises")["setup_commands"] if "pip install" in command)
    assert [Version(found) for found in re.findall(r"ray\[default\]==([\d.]+)", installs)] == [RAY]
    assert f"scaleot_ray-{__version__}-py3-none-any.whl" in installs


def for_root_alone(values: dict[str, Any]) -> bool:
    """Whether /shared stays as a new file system is when it is mounted: nobody but root may write to it."""
    commands = values["initialization_commands"]
    mounts = [place for place, command in enumerate(commands) if " mount " in command]
    return not any(re.search(r"\bchown ubuntu /shared$", command) for command in commands[mounts[-1] + 1 :])


def test_jobs_may_write_to_the_shared_disk() -> None:
    values = config("aws")
    assert not for_root_alone(values)
    values["initialization_commands"].sort(key=lambda command: " mount " in command)
    assert for_root_alone(values)


def test_ssh_is_not_open_to_everyone() -> None:
    for rule in config("aws")["provider"]["security_group"]["IpPermissions"]:
        assert all(not each["CidrIp"].endswith("/0") for each in rule["IpRanges"])
