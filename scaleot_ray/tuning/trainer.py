"""Tunes the plug-in layers of an emulator, or of a full model, on a data owner's batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scaleot_ray.config import TuneSettings
from scaleot_ray.data.batches import Batches
from scaleot_ray.errors import ConfigError
from scaleot_ray.families import Family
from scaleot_ray.progress import OnProgress
from scaleot_ray.tuning.checkpoint import model_fingerprint, resumable, tensors_fingerprint
from scaleot_ray.tuning.delta import Delta, MethodSettings
from scaleot_ray.tuning.gradient_checkpointing import gradient_checkpointing
from scaleot_ray.tuning.loss import LabelledLoss
from scaleot_ray.tuning.methods import method_named
from scaleot_ray.tuning.optimization import Optimization
from scaleot_ray.tuning.run import History, TuningRun


@dataclass
class Tuned:
    """Result of :func:`tune`: the delta, and how it came about."""

    delta: Delta
    history: History


def tune(
    model: Any,
    family: Family,
    positions: tuple[int, ...],
    batches: Batches,
    settings: TuneSettings,
    *,
    start: Delta | None = None,
    evaluate: Callable[[], float] | None = None,
    checkpoint: Path | None = None,
    resume: bool = True,
    on_progress: OnProgress | None = None,
    stage: str = "tune",
) -> Tuned:
    """Tunes the layers at ``positions`` and gives what changed; the model is then as it was before.

    The model trains in training mode, so with the dropout that its config has (GPT-2, OPT; Llama-like
    models have none). Batches, dropout and new parameters follow ``settings.seed``; the caller's random
    generators are left as they were.

    Args:
        model: a causal LM whose layers at ``positions`` are raw: an emulator or a full model.
        batches: seeded and re-iterable; one step takes ``settings.accumulate`` of them.
        start: what tuning begins with, tuned in the same way; the result is the whole change, ``start``
            included. Default: the model as it is.
        evaluate: value on validation rows, lower is better (nats per token); called every
            ``settings.evaluate_every`` steps and after the last, with the model in evaluation mode.
            With ``settings.patience`` the best state seen is the one that counts in the end.
        checkpoint: file of the run's checkpoint, written every ``settings.checkpoint_every`` steps,
            every minute and at the end; whoever has stored the delta deletes it.
        resume: carry on from ``checkpoint`` where it exists, bit for bit; False starts afresh.
        on_progress: hears of every step.
        stage: name of the work in progress reports.

    Raises:
        ConfigError: settings do not go together or with the device, ``start`` was tuned in another way, or
            ``checkpoint`` is of another run.
        DataError: the batches end, or have no labelled token.
        RunFailed: a loss or gradient is not finite, or the checkpoint is damaged; the last checkpoint is whole.
        ResourcesMissing: the disk is too full for a checkpoint.
    """
    device = next(model.parameters()).device
    check_settings(settings, device, evaluate)
    method = method_named(settings.method)()
    carried = method.settings(settings, family)
    if start is not None:
        check_start(start, method.name, positions, carried)
    identity: dict[str, Any] = {}
    saved = None
    if checkpoint is not None:
        identity = run_identity(model_fingerprint(model), positions, settings, start)
        saved = resumable(checkpoint, identity, resume)
    with training_mode(model, device, settings.gradient_checkpointing):
        torch.manual_seed(settings.seed)
        parameters = method.attach(model, family, positions, carried)
        loss, work = LabelledLoss(model), None
        try:
            if start is not None:
                method.load(start.tensors)
            work = Optimization(model, parameters, settings, method.learning_rate, device)
            run = TuningRun(
                model,
                work,
                batches,
                settings,
                saved=saved,
                evaluate=evaluate,
                checkpoint=checkpoint,
                identity=identity,
                on_progress=on_progress,
                stage=stage,
            )
            while not run.done:
                batch = run.next_batch()
                with work.autocast():
                    nats = loss(batch, device)
                work.part(nats).backward()
                run.passed()
            run.settle()
            tensors = method.changes(work.weights.values)
        finally:
            loss.close()
            if work is not None:
                work.close()
            method.detach()
    return Tuned(Delta(method.name, positions, carried, tensors), run.history)


def run_identity(model: str, positions: tuple[int, ...], settings: TuneSettings, start: Delta | None) -> dict[str, Any]:
    """What a run is of, as its checkpoint says.

    Args:
        model: fingerprint of the model.
        positions: of the plug-in layers.
        settings: of the run.
        start: what it begins with.
    """
    return {
        "model": model,
        "positions": list(positions),
        **{f"tune.{key}": value for key, value in settings.decisive().items()},
        **({"start": tensors_fingerprint(start.tensors)} if start is not None else {}),
    }


def check_start(start: Delta, method: str, positions: tuple[int, ...], settings: MethodSettings) -> None:
    """Refuses to begin with a delta that was tuned in another way.

    Raises:
        ConfigError: says what differs.
    """
    if (start.method, start.positions) != (method, positions):
        raise ConfigError(
            f"Tuning begins with a delta of {start.method} in layers {list(start.positions)}, but tune.method={method} "
            f"tunes layers {list(positions)}.",
            f"Set tune.method to {start.method}, on the emulator that the delta is for.",
        )
    if start.settings != settings:
        raise ConfigError(
            f"Tuning begins with a delta of {method} with {start.settings}, but the settings say {settings}.",
            "Tune in all rounds with the same rank, alpha and width.",
        )


def check_settings(settings: TuneSettings, device: torch.device, evaluate: Callable[[], float] | None) -> None:
    """Refuses settings that do not go together or with the device.

    Raises:
        ConfigError: names the key.
    """
    if settings.precision == "float16" and device.type == "cpu":
        raise ConfigError(
            "tune.precision: float16 arithmetic needs a GPU, found the device cpu.",
            "Set tune.precision to bfloat16 or float32.",
        )
    if settings.patience is not None and settings.evaluate_every is None:
        raise ConfigError(
            "tune.patience counts evaluations, but tune.evaluate_every is not set.", "Set tune.evaluate_every too."
        )
    if settings.evaluate_every is not None and evaluate is None:
        raise ConfigError(
            "tune.evaluate_every is set, but there are no validation rows to evaluate on.",
            "Give validation rows, or leave tune.evaluate_every and tune.patience out.",
        )


@contextmanager
def training_mode(model: Any, device: torch.device, recompute: bool) -> Iterator[None]:
    """Training mode; afterwards the model's mode and all random generators are as before.

    Args:
        model: to be trained.
        device: where it is.
        recompute: with gradient checkpointing.
    """
    was_training = model.training
    context = gradient_checkpointing(model) if recompute else nullcontext()
    # torch.manual_seed seeds every GPU, whichever is computed on.
    with torch.random.fork_rng(range(torch.cuda.device_count())), context:
        model.train()
        try:
            yield
        finally:
            model.train(was_training)
