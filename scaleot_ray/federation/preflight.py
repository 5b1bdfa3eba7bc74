"""Before a run starts: does the machine have what it needs? Better an error now than a hang later."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from tempfile import TemporaryFile

from scaleot_ray.artifacts.storage import read_manifest
from scaleot_ray.config import AggregationSettings, RunSettings
from scaleot_ray.errors import ArtifactRefused, ConfigError, ResourcesMissing
from scaleot_ray.federation.folder import RunFolder
from scaleot_ray.federation.rounds.administration import registry_place
from scaleot_ray.federation.rounds.artifact_location import Location
from scaleot_ray.federation.rounds.artifact_store import KEY
from scaleot_ray.federation.rounds.own_registry import check_own
from scaleot_ray.federation.rounds.registry import AGGREGATE
from scaleot_ray.federation.rounds.registry.database import KEY as REGISTRY
from scaleot_ray.federation.rounds.registry.local_volume import check_local
from scaleot_ray.plugin.aggregation import check_fits_tuning
from scaleot_ray.resources.machine import Machine, free_disk
from scaleot_ray.resources.needs import RAY, Memory, Needs

_GB = 1e9


def preflight(settings: RunSettings, needs: Needs, machine: Machine) -> None:
    """Compares what a run needs with what is there.

    Only what is certain is refused: processors, GPUs, the bytes of weights and artefacts. What
    activations need is an estimate; it decides how many actors run at once, not whether one may.

    Raises:
        ResourcesMissing: names what was asked for, what is there, and the setting to change.
        ConfigError: the place of ``artifacts`` cannot be written to.
    """
    check_processors(settings, machine)
    check_memory(settings, needs, machine)
    check_storage(settings, needs)


def check_storage(settings: RunSettings, needs: Needs) -> None:
    """Whether there is room for what is written, and the place of artefacts can be written to.

    Raises:
        ResourcesMissing: a disk is too full.
        ConfigError: the place of ``artifacts`` cannot be written to.
    """
    check_disk(Path(settings.output), needs)
    if settings.artifacts is not None:
        check_artifacts(settings.artifacts, needs)


def check_settings(settings: RunSettings) -> None:
    """What settings say that cannot be, as far as it shows on the node that a run is led from.

    Raises:
        ConfigError: names the setting.
    """
    check_names(settings)
    check_aggregation(settings)
    check_registry(settings)


def check_names(settings: RunSettings) -> None:
    """Whether the registry takes the names of all data owners.

    Raises:
        ConfigError: one has the aggregate's.
    """
    for index, tenant in enumerate(settings.tenants):
        if tenant.name == AGGREGATE:
            raise ConfigError(
                f"tenants.{index}.name: no data owner can be called {AGGREGATE!r}, which is the plug-in of them all.",
                "Give it another name.",
            )


def check_registry(settings: RunSettings) -> None:
    """Whether the place of the registry takes it, and has the one that there is of an earlier start.

    Raises:
        ConfigError: it is on a network file system, cannot be written to, or the run's registry is not there.
    """
    folder = RunFolder(Path(settings.output))
    place = registry_place(folder, settings.registry)
    check_local(place, REGISTRY)
    with contextlib.suppress(ArtifactRefused):  # there is none yet, or it will be built again
        check_own(folder.coordinator, place, read_manifest(folder.emulator).digest()[:16])
    if settings.registry is None:
        return  # whoever holds the run's folder has looked
    try:
        place.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise ConfigError(
            f"{REGISTRY}: {place} cannot be written ({error.strerror or error}).",
            f"Set {REGISTRY} to a folder that you may write to, on a disk of this machine.",
        ) from error


def check_aggregation(settings: RunSettings) -> None:
    """Whether what data owners tune can be aggregated, and the next round begin with it.

    Raises:
        ConfigError: names the settings that do not go together.
    """
    how = settings.aggregation
    if how is None:
        return
    tunes = {tenant.name: settings.tune_of(tenant) for tenant in settings.tenants}
    methods = sorted({tune.method for tune in tunes.values()})
    if len(methods) > 1:
        raise ConfigError(
            f"aggregation: data owners tune with different methods, {' and '.join(methods)}.",
            "Set one tune.method for all, or leave aggregation out: each then has a plug-in of its own.",
        )
    check_fits_tuning(how, methods[0])
    _check_trim(settings, how)
    if settings.rounds.count == 1 or methods != ["lora"]:
        return
    if how.method == "concat":
        raise ConfigError(
            "aggregation.method: concat adds up the ranks of all data owners, so the next round cannot begin with it.",
            "Set aggregation.method to svd, or rounds.count to 1.",
        )
    shapes = sorted({(tune.lora_rank, tune.lora_alpha) for tune in tunes.values()})
    if len(shapes) > 1 or how.rank not in (None, shapes[0][0]):
        own = " and ".join(f"rank {rank}, alpha {alpha:g}" for rank, alpha in shapes)
        made = f", and aggregation.rank is {how.rank}" if how.rank is not None else ""
        raise ConfigError(
            "tune.lora_rank: a round begins with the aggregate of the one before, which has one rank and alpha for "
            f"all; data owners tune with {own}{made}.",
            "Set one tune.lora_rank and tune.lora_alpha for all and leave aggregation.rank out, or set rounds.count "
            "to 1.",
        )


def _check_trim(settings: RunSettings, how: AggregationSettings) -> None:
    # A round that went on with its quorum alone would end after all have tuned. What has weight 0 is in no aggregate.
    silent = sum(tenant.weight == 0 for tenant in settings.tenants)
    count = max((settings.rounds.quorum or len(settings.tenants)) - silent, 1)
    if how.method != "trimmed_mean" or not how.trim or math.floor(how.trim * count + 1e-9):
        return
    of = f"the {count} deltas of rounds.quorum" if settings.rounds.quorum else f"{count} deltas"
    of += " with a weight above 0" if silent else ""
    enough = math.ceil(1000 / count) / 1000
    remedies = [f"aggregation.trim to {enough:g} or more (below 0.5)"] if enough < 0.5 else []
    if (larger := math.ceil(1 / how.trim) + silent) <= len(settings.tenants):
        remedies.append(f"rounds.quorum to {larger} or more")
    remedies.append("aggregation.method to median")
    raise ConfigError(
        f"aggregation.trim: {how.trim:g} of {of} is less than one, so none would be left out.",
        f"Set {', or '.join(remedies)}.",
    )


def check_processors(settings: RunSettings, machine: Machine) -> None:
    """Every actor must fit alone: those that do not fit together wait for one another.

    Raises:
        ResourcesMissing: an actor asks for more processors or GPUs than are free.
    """
    asked = {"owner_cpus": settings.owner_cpus, "owner_gpus": settings.owner_gpus}
    for index, tenant in enumerate(settings.tenants):
        asked |= {f"tenants.{index}.cpus": tenant.cpus, f"tenants.{index}.gpus": tenant.gpus}
    for key, wanted in asked.items():
        what, there, held = "processors", float(machine.cpus), machine.cpus_held
        if key.endswith("gpus"):
            what, there, held = "GPUs", machine.gpus, machine.gpus_held
        if wanted > there:
            remedies = [f"set {key} to {there:g} or less"] if there else []
            if held:
                remedies.append("wait until others on this Ray have ended (`ray status` shows what is taken)")
            remedy = ", ".join([*remedies, "or use a larger machine"]) if remedies else "use a larger machine"
            raise ResourcesMissing(
                f"{key}: {wanted:g} {what} are asked for, {there:g} are "
                + (f"free on this node of Ray ({held:g} are taken)." if held else "there."),
                f"{remedy[0].upper()}{remedy[1:]}.",
            )


def check_memory(settings: RunSettings, needs: Needs, machine: Machine) -> None:
    """The largest actor of each phase must fit beside the shared emulator, and that into shared memory.

    Raises:
        ResourcesMissing: it does not.
    """
    if machine.shared_memory is not None and needs.object_store > machine.shared_memory:
        raise ResourcesMissing(
            f"shared memory: the object store needs {_gb(needs.object_store)} for an emulator of up to "
            f"{_gb(needs.emulator)}, {_gb(machine.shared_memory)} are free in /dev/shm.",
            "In a container, start it with a larger one (docker run --shm-size=…, or an emptyDir of medium Memory); "
            "or set model.dtype to bfloat16.",
        )
    check_coordinator(needs, machine.memory)
    phases: list[tuple[str, Memory, int]] = [("the model owner's build", needs.owner, 0)]
    phases += [(f"tuning by data owner {name}", memory, needs.emulator) for name, memory in needs.data_owners.items()]
    phases += [(f"the evaluator of {name}", memory, needs.emulator) for name, memory in needs.evaluators.items()]
    for what, memory, shared in phases:
        wanted = RAY + shared + memory.weights
        if wanted > machine.memory:
            raise ResourcesMissing(
                f"memory: {what} needs at least {_gb(wanted)}, {_gb(machine.memory)} are free.",
                "Set model.dtype to bfloat16, tune.method to lora, or evaluator to false; or use a larger machine.",
            )


def check_coordinator(needs: Needs, memory: int) -> None:
    """What the coordinator holds at once must fit beside the shared emulator, on the node that a run is led from.

    Args:
        needs: of the run.
        memory: bytes that are free there.

    Raises:
        ResourcesMissing: it does not.
    """
    for what, own, remedy in (
        # It reads and checks the emulator in its own memory before it is shared.
        ("sharing the emulator", needs.emulator, "Set model.dtype to bfloat16"),
        (
            "aggregating what data owners tuned",
            needs.aggregation,
            "Set aggregation.method to mean, median or trimmed_mean, which take deltas piece by piece, or tune less "
            "(emulator.plug_in_layers, tune.lora_rank)",
        ),
    ):
        wanted = RAY + needs.emulator + own
        if wanted > memory:
            raise ResourcesMissing(
                f"memory: {what} needs at least {_gb(wanted)}, {_gb(memory)} are free.",
                f"{remedy}; or use a larger machine.",
            )


def check_disk(output: Path, needs: Needs) -> None:
    """The output folder's disk must hold what is written; what an earlier run left there counts as written.

    Raises:
        ResourcesMissing: it does not.
    """
    _check_room("output", "artefacts and checkpoints", output, needs.disk)


def check_artifacts(artifacts: str, needs: Needs) -> None:
    """The place where deltas and aggregates are kept must take files, and a folder's disk must hold them.

    Raises:
        ConfigError: it cannot be reached, or not be written to.
        ResourcesMissing: its disk is too small.
    """
    location = Location.of(artifacts)
    location.check()
    if location.filesystem is None:
        _check_room(KEY, "deltas and aggregates", Path(location.path), needs.kept)


def _check_room(key: str, what: str, folder: Path, needed: int) -> None:
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
    wanted, free = needed - there, free_disk(folder)
    if wanted > free:
        raise ResourcesMissing(
            f"{key}: {what} need up to {_gb(wanted)} in {folder}, {_gb(free)} are free.",
            f"Free some room, or set {key} to a folder on another disk.",
        )


def _gb(count: int) -> str:
    return f"{count / _GB:.2g} GB" if count < 10 * _GB else f"{count / _GB:.0f} GB"
