"""docs/administration.md: its settings are read by the real reader, its figures come from the preflight."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from scaleot_ray.cli.settings import TuneCommandSettings
from scaleot_ray.config import RunSettings, load_yaml, parse
from scaleot_ray.federation.driver.placement import check_labels
from scaleot_ray.federation.driver.works import tuning
from scaleot_ray.federation.environment import look_here
from scaleot_ray.federation.preflight import check_aggregation
from scaleot_ray.resources.needs import Needs, run_needs
from tests.cli.command import PROJECT
from tests.cluster.manifests import FOLDER, GPU, bytes_of, load, nodes, of_kind, pods
from tests.cluster.pins import IMAGE
from tests.cluster.sizes import SIZES
from tests.cluster.test_dashboard import exported
from tests.federation.driver.test_placement import node

PAGE = (PROJECT / "docs" / "administration.md").read_text()


def keys_of(section: type[BaseModel], start: str = "") -> set[str]:
    """Every key of a section and of those in it; entries of a list are numbered N."""
    found = set()
    for name, field in section.model_fields.items():
        found.add(f"{start}{name}")
        for inner, prefix in _sections_in(field.annotation):
            found |= keys_of(inner, f"{start}{name}.{prefix}")
    return found


def _sections_in(annotation: Any) -> list[tuple[type[BaseModel], str]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [(annotation, "")]
    many = getattr(annotation, "__origin__", None) is tuple
    found = [each for argument in get_args(annotation) for each in _sections_in(argument)]
    return [(section, "N." if many else prefix) for section, prefix in found]


def unknown_keys(page: str) -> set[str]:
    """Settings that a page names and that do not exist."""
    keys = keys_of(RunSettings)
    tops = {key.split(".")[0] for key in keys}
    dotted = set(re.findall(r"`([a-z_]+(?:\.[A-Za-z_]+)+)`", page))
    dotted = {name for name in dotted if name.split(".")[0] in tops and not name.endswith(".py")}
    table = re.search(r"\| setting \| bounds \|\n(.*?)\n\n", page, flags=re.S)
    named = re.findall(
        r"`([^`]+)`", "".join(line.split("|")[1] for line in table.group(1).splitlines()) if table else ""
    )
    return {*dotted, *named} - keys


def test_only_settings_that_exist_are_named() -> None:
    assert {"tenants.N.tune.lora_rank", "rounds.max_norm"} <= keys_of(RunSettings)
    assert unknown_keys(PAGE) == set()
    wrong = "`rounds.retries` `tune.stepps` `tune.py`\n| setting | bounds |\n|---|---|\n"
    wrong += "| `tenants_at_a_time`, `registry` | |\n\n"
    assert unknown_keys(wrong) == {"rounds.retries", "tune.stepps", "tenants_at_a_time"}


def test_the_quickstarts_settings_make_a_run() -> None:
    here, step, more = (yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.S))
    run = parse(RunSettings, here)
    assert parse(TuneCommandSettings, step).emulator == f"{run.output}/emulator"
    check_aggregation(run)
    assert (len(run.tenants), run.rounds.count) == (4, 2)
    labels = {"node_labels": yaml.safe_load(*re.findall(r"`node_labels: ({.*?})`", PAGE))}
    spread = parse(RunSettings, {**here, **more, "tenants": [{**tenant, **labels} for tenant in here["tenants"]]})
    started = re.findall(r"^ray start .*--labels (\S+)=(\S+)", PAGE, flags=re.M)
    check_labels(spread, [node(labels={name: value}) for name, value in started])


def test_the_quickstart_writes_its_model_and_data(tmp_path: Path) -> None:
    (script,) = re.findall(r"^python - /shared <<'END'\n(.*?)^END$", PAGE, flags=re.M | re.S)
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, cwd=PROJECT)
    settings = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.S)[0].replace("/shared", str(tmp_path))
    run = parse(RunSettings, yaml.safe_load(settings))
    assert look_here(run).size.layers == 8


def metrics_of(page: str) -> dict[str, set[str]]:
    """The metrics that a page lists, with their tags."""
    rows = re.findall(r"^\| (`ray_scaleot_.*?) \| (.*?) ?\| .* \|$", page, flags=re.M)
    return {name: set(re.findall(r"`(\w+)`", tags)) for names, tags in rows for name in re.findall(r"`(\w+)`", names)}


def test_metrics_are_those_of_a_run() -> None:
    there = exported()
    assert all("run" in tags for tags in there.values())
    assert metrics_of(PAGE) == {name: tags - {"run"} for name, tags in there.items()}
    for metric, tags in re.findall(r"^(ray_scaleot_\w+)\{(.*)\} [\d.]+$", PAGE, flags=re.M):
        assert set(re.findall(r"(\w+)=", tags)) == there[metric]


def test_a_metric_that_is_gone_or_has_other_tags_is_noticed() -> None:
    wrong = PAGE.replace("| `ray_scaleot_round` | |", "| `ray_scaleot_rounds` | |").replace("| `state` |", "| `end` |")
    found = metrics_of(wrong)
    assert found.keys() ^ exported().keys() == {"ray_scaleot_round", "ray_scaleot_rounds"}
    assert found["ray_scaleot_round_seconds_sum"] == {"end"}


def test_scripts_and_image_are_there() -> None:
    scripts = {name.removeprefix("jobs/") for name in re.findall(r"(?:python |`(?:jobs/)?)(\w+\.py)", PAGE)}
    assert len(scripts) == 5
    assert scripts == {path.name for path in (PROJECT / "jobs").glob("*.py")}
    assert set(re.findall(r"registry\.example\.com/\S+", PAGE)) == {IMAGE}


def _gigabytes(count: int, digits: int = 1) -> str:
    return f"{count / 1e9:.{digits}f}" if count < 1e10 else f"{count / 1e9:.{digits - 1}f}"


def _needs(size: str, dtype: str, method: str, tenants: int) -> Needs:
    data = {"path": "rows.jsonl"}
    values = {
        "model": {"path": "model", "dtype": dtype},
        "public": data,
        "tune": {"method": method},
        "rounds": {"count": 3},
        "aggregation": {"method": "svd" if method == "lora" else "mean"},
        "tenants": [{"name": f"tenant-{number}", "train": data, "test": data} for number in range(tenants)],
    }
    return run_needs(parse(RunSettings, values), SIZES[size])


@pytest.mark.parametrize("row", re.findall(r"^\| (\S+), (\w+) \| (\w+) \| (.*) \|$", PAGE, flags=re.M), ids=" ".join)
def test_figures_are_those_of_the_preflight(row: tuple[str, ...]) -> None:
    size, dtype, method, shown = row
    eight, nine = _needs(size, dtype, method, 8), _needs(size, dtype, method, 9)
    grow = [
        f"{_gigabytes(at)} ({_gigabytes(then - at, 2)})"
        for at, then in ((eight.object_store, nine.object_store), (eight.disk, nine.disk))
    ]
    same = [_gigabytes(count) for count in (eight.owner.total, eight.data_owners["tenant-0"].total)]
    assert shown.split(" | ") == [*grow, *same]


def test_figures_for_twenty_are_those_of_the_preflight() -> None:
    lora, layers = (_needs("7B", "bfloat16", method, 20) for method in ("lora", "layers"))
    words = (
        f"Twenty data owners on the 7B model need {_gigabytes(lora.object_store)} GB of object store and "
        f"{_gigabytes(lora.disk)} GB of disk with `lora`, or {_gigabytes(layers.object_store)} GB and "
        f"{_gigabytes(layers.disk)} GB with `layers`."
    )
    assert words in " ".join(PAGE.split())


def test_the_readmes_figures_for_a_7b_model_are_those_of_the_preflight() -> None:
    lora, layers = (_needs("7B", "bfloat16", method, 1) for method in ("lora", "layers"))
    tuned = [_gigabytes(each.emulator + each.data_owners["tenant-0"].total) for each in (lora, layers)]
    words = f"{_gigabytes(lora.owner.total)} GB to build, {tuned[0]} GB to tune with LoRA, {tuned[1]} GB to tune whole "
    assert words in " ".join((PROJECT / "README.md").read_text().split())


def test_twenty_in_four_processes_fit_into_the_pods_of_the_manifests() -> None:
    (each, claimed, pod) = re.findall(
        r"`tenants_per_process: (\d+)`.*?claim (\d+) GB.*?pod of (\d+) GiB", PAGE, flags=re.S
    )[0]
    (job,) = of_kind(load(), "RayJob")
    run = load_yaml(RunSettings, FOLDER / "run.yaml")
    needs = run_needs(run, SIZES["7B"])
    work = tuning(needs, "pack", [run.tenants[0]] * int(each), lambda: None)
    assert _gigabytes(work.memory) == claimed
    node = next(node for node in nodes(job) if node.labels == run.tenants[0].node_labels)
    assert node.memory == int(pod) << 30
    assert work.memory + node.object_store < node.memory


def test_the_guide_says_how_much_the_manifests_ask_for() -> None:
    asked = re.findall(r"(\d+) CPUs, (\d+) GiB(?: of memory)?\s*and (\d+) GPUs", PAGE)
    for cluster, numbers in zip(("scaleot-run", "scaleot"), asked, strict=True):
        total = [0, 0, 0]
        for pod in pods(load()):
            limits, count = pod.container["resources"]["limits"], pod.group.get("replicas", 1)
            each = (int(limits["cpu"]), bytes_of(limits["memory"]) >> 30, int(limits.get(GPU, 0)))
            if pod.where.startswith(f"{cluster}, "):
                total = [before + count * one for before, one in zip(total, each, strict=True)]
        assert [int(number) for number in numbers] == total, cluster


def test_there_are_figures() -> None:
    assert len(re.findall(r"^\| \S+, \w+ \| (?:layers|lora) \|", PAGE, flags=re.M)) == 5
