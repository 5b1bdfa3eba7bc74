"""Tune several data owners on one resident emulator: what each gets is what it would get alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from scaleot_ray.artifacts.artifact import Artifact
from scaleot_ray.emulator.assemble import assemble, emulator_content
from scaleot_ray.errors import ConfigError
from scaleot_ray.families import family_of
from scaleot_ray.families.loading import load_tokenizer, resolve_device
from scaleot_ray.progress import OnProgress, Progress
from scaleot_ray.stages.tune import OwnersTuning, TuneRequest, TuneResult
from scaleot_ray.stages.tune_layers import tuning_rows
from scaleot_ray.tuning import Tuned
from scaleot_ray.tuning.packed import PackedTenant, check_packable, check_repeatable, tune_packed

OnFinished = Callable[[str, TuneResult], None]
OnFailed = Callable[[str, Exception], None]


def tune_emulator_packed(
    emulator: Artifact,
    requests: Sequence[TuneRequest],
    *,
    finished: OnFinished,
    failed: OnFailed,
    on_progress: Callable[[str, Progress], None] | None = None,
    device: str = "auto",
) -> None:
    """:func:`~scaleot_ray.stages.tune.tune_emulator` for several data owners at once, with ``tune.method=lora``.

    Each gets its own folder, artefacts, record and checkpoint, as if tuned alone; so either way takes what the
    other has finished or begun. They differ in the last digits only
    (:func:`~scaleot_ray.tuning.packed.tune_packed`).

    Args:
        emulator: checked by the caller; held once.
        requests: who tunes, on what and how.
        finished: takes a data owner's name and result, as soon as it is written. What it raises makes the
            data owner one that failed.
        failed: takes a data owner's name and error, whatever ``tune_emulator`` would have raised; the others go on.
        on_progress: hears, with the data owner's name, what ``tune_emulator`` reports. What it raises ends that
            data owner's tuning alone.
        device: where to compute.

    Raises:
        ConfigError: two data owners have one name or one folder, or the emulator's model cannot be shared in one
            pass (it trains with dropout, or cannot recompute activations as one of them asks).
        ResourcesMissing: memory does not suffice.
    """
    _check_apart(requests)
    waiting: list[OwnersTuning] = []
    for request in requests:
        with _alone(request.name, failed):
            tuning = OwnersTuning(emulator, request, _named(request.name, on_progress))
            check_packable(request.tune)
            found = tuning.finished()
            if found is not None:
                finished(request.name, found)
                continue
            tuning.check_output()
            waiting.append(tuning)
    if not waiting:
        return
    model, tokenizer = assemble(emulator, resolve_device(device)), load_tokenizer(emulator.files)
    check_repeatable(model)  # before rows are read and scored
    ready: dict[str, OwnersTuning] = {}
    tenants: list[PackedTenant] = []
    for tuning in waiting:
        name = tuning.request.name
        with _alone(name, failed):
            tenants.append(_tenant(tuning, model, tokenizer, _named(name, on_progress)))
            ready[name] = tuning

    def write(name: str, tuned: Tuned) -> None:
        finished(name, ready[name].result(model, tuned))

    positions = emulator_content(emulator.manifest).plug_in_positions
    tune_packed(model, family_of(model.config), positions, tenants, finished=write, failed=failed)


def _tenant(tuning: OwnersTuning, model: Any, tokenizer: Any, on_progress: OnProgress | None) -> PackedTenant:
    request = tuning.request
    tuning.measure(model, tokenizer)
    batches, evaluate = tuning_rows(
        model,
        tokenizer,
        request.train,
        request.validation,
        request.tune,
        request.evaluate_examples,
        request.earlier_steps,
    )
    return PackedTenant(
        request.name,
        batches,
        request.tune,
        start=tuning.start,
        evaluate=evaluate,
        checkpoint=tuning.checkpoint,
        resume=request.resume,
        on_progress=on_progress,
        stage=tuning.stage,
    )


def _named(name: str, on_progress: Callable[[str, Progress], None] | None) -> OnProgress | None:
    return partial(on_progress, name) if on_progress is not None else None


@contextmanager
def _alone(name: str, failed: OnFailed) -> Iterator[None]:
    """What goes wrong inside is one data owner's own."""
    try:
        yield
    except Exception as error:
        failed(name, error)


def _check_apart(requests: Sequence[TuneRequest]) -> None:
    for what, values in (
        ("names", [request.name for request in requests]),
        ("folders", [str(request.output.resolve()) for request in requests]),
    ):
        if len(set(values)) < len(values):
            raise ConfigError(
                f"Data owners that tune together have {what} of their own, found {', '.join(values)}.",
                "Give each its own name and output folder.",
            )
