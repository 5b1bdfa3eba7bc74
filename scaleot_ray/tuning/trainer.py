"""Tunes the plug-in layers of an emulator, or of a full model, on a data owner's batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from scaleot_ray.checkpoints import CheckpointPace
from scaleot_ray.config import TuneSettings
from scaleot_ray.data.batches import Batch, Batches
from scaleot_ray.errors import ConfigError, DataError, RunFailed
from scaleot_ray.families import Family
from scaleot_ray.progress import OnProgress, ProgressMeter
from scaleot_ray.tuning.checkpoint import (
    Checkpoint,
    batch_fingerprint,
    check_same_run,
    model_fingerprint,
    prepare_place,
    read_checkpoint,
    tensors_fingerprint,
)
from scaleot_ray.tuning.delta import Delta, MethodSettings
from scaleot_ray.tuning.gradient_checkpointing import gradient_checkpointing
from scaleot_ray.tuning.methods import method_named
from scaleot_ray.tuning.optimization import Optimization


@dataclass
class History:
    """What happened so far.

    Attributes:
        losses: nats per labelled token of every optimizer step.
        evaluations: (step, value) of every evaluation; lower is better.
        stopped_early: whether patience ran out.
    """

    losses: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    stopped_early: bool = False

    @property
    def steps(self) -> int:
        """Optimizer steps done."""
        return len(self.losses)

    @property
    def best(self) -> tuple[int, float] | None:
        """(step, value) of the best evaluation, the first of equals; None where there was none."""
        return min(self.evaluations, key=lambda entry: entry[1], default=None)

    @property
    def evaluations_without_gain(self) -> int:
        """Evaluations since the best one."""
        return len(self.evaluations) - 1 - self.evaluations.index(self.best) if self.best else 0


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
    _check(settings, device, evaluate)
    method = method_named(settings.method)()
    carried = method.settings(settings, family)
    if start is not None:
        _check_start(start, method.name, positions, carried)
    saved = None
    run: dict[str, Any] = {}
    if checkpoint is not None:
        prepare_place(checkpoint)
        run = {
            "model": model_fingerprint(model),
            "positions": list(positions),
            **{f"tune.{key}": value for key, value in settings.decisive().items()},
            **({"start": tensors_fingerprint(start.tensors)} if start is not None else {}),
        }
        saved = read_checkpoint(checkpoint) if resume else None
        if saved is not None:
            check_same_run(saved.run, run, checkpoint)
    with _training(model, settings, device):
        parameters = method.attach(model, family, positions, carried)
        work = None
        try:
            if start is not None:
                method.load(start.tensors)
            work = Optimization(model, parameters, settings, method.learning_rate, device)
            loop = _Loop(model, work, settings, evaluate, checkpoint, run)
            loop.go(batches, saved, on_progress, stage)
            tensors = method.changes(work.weights.values)
        finally:
            if work is not None:
                work.close()
            method.detach()
    return Tuned(Delta(method.name, positions, carried, tensors), loop.history)


class _Loop:
    """The steps of a run, its evaluations and checkpoints."""

    def __init__(
        self,
        model: Any,
        work: Optimization,
        settings: TuneSettings,
        evaluate: Callable[[], float] | None,
        checkpoint: Path | None,
        run: dict[str, Any],
    ) -> None:
        self.model, self.work, self.settings, self.evaluate = model, work, settings, evaluate
        self.checkpoint, self.run = checkpoint, run
        self.history = History()
        self.best: dict[str, torch.Tensor] | None = None  # kept only where patience asks for it

    def go(self, batches: Batches, saved: Checkpoint | None, on_progress: OnProgress | None, stage: str) -> None:
        """Runs to the last step, or until patience runs out; the weights are then those that count."""
        stream = self._resume(saved, batches) if saved is not None else batches.batches()
        settings = self.settings
        meter = ProgressMeter(stage, settings.steps, on_progress, done=self.history.steps)
        pace = CheckpointPace(settings.checkpoint_every)
        while self.history.steps < settings.steps and not self.history.stopped_early:
            taken = list(islice(stream, settings.accumulate))
            step = self.history.steps + 1
            if len(taken) < settings.accumulate:
                raise DataError(f"Step {step}: the batches have come to an end.", "Give batches that start over.")
            loss = self.work.step(step, taken)
            self.history.losses.append(loss)
            last = step == settings.steps
            if settings.evaluate_every and (step % settings.evaluate_every == 0 or last):
                self._evaluate(step)
            last = last or self.history.stopped_early
            if self.checkpoint is not None and (pace.due(step) or last):
                pace.write(partial(self._save, self.checkpoint, taken[-1]))
            meter.advance(tokens=sum(_tokens(batch) for batch in taken), loss=loss)
        if self.best is not None:
            self.work.weights.load(self.best)

    def _evaluate(self, step: int) -> None:
        assert self.evaluate is not None
        self.model.eval()
        with torch.no_grad():
            value = float(self.evaluate())
        self.model.train()
        if not math.isfinite(value):
            raise RunFailed(f"Step {step}: the evaluation gave {value}.", "Lower tune.learning_rate.")
        self.history.evaluations.append((step, value))
        if self.settings.patience is None:
            return
        if self.history.best == (step, value):
            self.best = self.work.weights.copy()
        self.history.stopped_early = self.history.evaluations_without_gain >= self.settings.patience

    def _save(self, path: Path, batch: Batch) -> None:
        tensors, scaler = self.work.state()
        tensors |= {f"best.{name}": value for name, value in (self.best or {}).items()}
        record = {"history": asdict(self.history), "scaler": scaler, "batch": batch_fingerprint(batch)}
        Checkpoint(self.run, record, tensors).write(path)

    def _resume(self, saved: Checkpoint, batches: Batches) -> Iterator[Batch]:
        """Puts the state back and gives the batches that follow, after checking that they are the same data."""
        history = saved.record["history"]
        history["evaluations"] = [(int(step), float(value)) for step, value in history["evaluations"]]
        self.history = History(**history)
        self.best = saved.part("best.") or None
        stream = batches.batches(self.history.steps * self.settings.accumulate - 1)
        if batch_fingerprint(next(stream)) != saved.record["batch"]:
            raise ConfigError(
                f"{self.checkpoint}: the checkpoint is of another run: its data are not these.",
                "Go on with the data it was started with, or delete the checkpoint to start afresh.",
            )
        self.work.load_state(saved.tensors, saved.record["scaler"])
        return stream


def _tokens(batch: Batch) -> int:
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.sum())


def _check_start(start: Delta, method: str, positions: tuple[int, ...], settings: MethodSettings) -> None:
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


def _check(settings: TuneSettings, device: torch.device, evaluate: Callable[[], float] | None) -> None:
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
def _training(model: Any, settings: TuneSettings, device: torch.device) -> Iterator[None]:
    """Training mode with the run's seed; afterwards the model's mode and all random generators are as before."""
    was_training = model.training
    recompute = gradient_checkpointing(model) if settings.gradient_checkpointing else nullcontext()
    with torch.random.fork_rng([device] if device.type == "cuda" else []), recompute:
        torch.manual_seed(settings.seed)
        model.train()
        try:
            yield
        finally:
            model.train(was_training)
