"""A whole run: one model owner, several data owners, on this machine or on the nodes of a cluster."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

from scaleot_ray.config import RunSettings
from scaleot_ray.federation.driver.actors import Actors
from scaleot_ray.federation.driver.phases import Phases
from scaleot_ray.federation.driver.report import RunReport
from scaleot_ray.federation.driver.run_state import RunState, Tenant
from scaleot_ray.federation.environment import look_here, on_cluster, on_this_machine
from scaleot_ray.federation.folder import RunFolder
from scaleot_ray.federation.preflight import check_settings
from scaleot_ray.interruption import interruptible
from scaleot_ray.progress import OnProgress, OnTenantState
from scaleot_ray.resources.processes import PeakMemory
from scaleot_ray.result_folder import is_uri

_AGAIN = "Run the same command again: finished parts are reused, the rest goes on from its checkpoints."


def run_local(
    settings: RunSettings,
    *,
    on_progress: OnProgress | None = None,
    on_state: OnTenantState | None = None,
    debug: bool = False,
) -> RunReport:
    """Runs everything: the owner builds, all data owners tune at once, an evaluator measures if declared.

    In the environment ``local``, Ray is started for the run and gone after it; where one is given explicitly
    (``RAY_ADDRESS``, or this process is connected), the run's actors work there, on this node. In the
    environment ``cluster`` one is given, and they work on whichever of its nodes has room and the labels that
    the settings ask for. What an earlier run of the same settings finished in ``settings.output`` is reused,
    what it left unfinished goes on from its checkpoints, and what was made with other settings is made again.

    Args:
        settings: the run.
        on_progress: hears of every stage, in this thread.
        on_state: hears what each data owner is about, in this thread.
        debug: show what the actors print.

    Returns:
        The report, which is also written to ``report.json`` in the run's folder.

    Raises:
        ConfigError, DataError: a setting or a dataset is wrong; most of it before anything starts.
        ArtifactRefused: something must not cross.
        ResourcesMissing: the machine has not what the run needs, or others hold it on a Ray that was given.
        RunFailed: an actor died, a loss became NaN, a shared tensor was written to. Where that befell evaluators,
            the run ends so only if not one data owner could be measured; the report is written then as well.
        Interrupted: SIGINT or SIGTERM; all processes are gone and checkpoints are usable.
    """
    start = time.monotonic()
    settings = with_absolute_paths(settings)
    check_settings(settings)
    facts = look_here(settings) if settings.environment == "local" else None
    folder = RunFolder(Path(settings.output))
    with interruptible(_AGAIN) as listen, folder.held(), PeakMemory() as memory, ExitStack() as stack:
        if facts is not None:
            there = stack.enter_context(on_this_machine(settings, facts, debug, listen))
        else:
            there = stack.enter_context(on_cluster(settings, debug, listen, on_progress))
        started = time.monotonic() - start
        actors = stack.enter_context(Actors(there.session, memory, on_progress, there.place))
        tenants = [Tenant(tenant) for tenant in settings.tenants]
        state = RunState(
            settings, folder, there.needs, actors, there.schedule, tenants, there.rows_bytes, on_state=on_state
        )
        phases = Phases(state)
        report = phases.run()
    report.seconds = {"total": time.monotonic() - start, "start": started, **report.seconds}
    report.peak_rss_bytes = memory.bytes
    report.write()
    if (problem := phases.failure()) is not None:
        raise problem
    return report


def with_absolute_paths(settings: RunSettings) -> RunSettings:
    """The same settings for a process with another working folder: existing paths in full."""

    tenants = tuple(
        tenant.model_copy(
            update={
                "train": tenant.train.absolute(),
                "test": tenant.test.absolute(),
                "validation": tenant.validation and tenant.validation.absolute(),
            }
        )
        for tenant in settings.tenants
    )
    output = str(Path(settings.output).expanduser().absolute())
    update = {
        "model": settings.model.absolute(),
        "public": settings.public.absolute(),
        "tenants": tenants,
        "output": output,
    }
    if settings.artifacts is not None and not is_uri(settings.artifacts):
        update["artifacts"] = str(Path(settings.artifacts).absolute())
    return settings.model_copy(update=update)
