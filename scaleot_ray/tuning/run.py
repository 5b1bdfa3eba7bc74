"""A tuning on its way: batches, optimizer steps, evaluations, checkpoints. Who drives it computes the losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
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
from scaleot_ray.progress import OnProgress, ProgressMeter
from scaleot_ray.tuning.checkpoint import Checkpoint, batch_fingerprint
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


class TuningRun:
    """One data owner's run, alone on a model or beside others'.

    Its driver repeats, until :attr:`done`: :meth:`next_batch`, the backward pass of ``work.part(loss)``,
    :meth:`passed`; and at last :meth:`settle`.

    Args:
        model: in training mode, with the parameters of ``work``.
        work: the optimizer's side.
        batches: what it tunes on.
        settings: of the run.
        saved: what it goes on from; None begins with the first batch.
        evaluate: value on validation rows, lower is better.
        checkpoint: file of its checkpoint; None writes none.
        identity: what the run is of, for the checkpoint.
        on_progress: hears of every step.
        stage: name of the work in progress reports.

    Raises:
        ConfigError: ``saved`` is of other data.
    """

    def __init__(
        self,
        model: Any,
        work: Optimization,
        batches: Batches,
        settings: TuneSettings,
        *,
        saved: Checkpoint | None = None,
        evaluate: Callable[[], float] | None = None,
        checkpoint: Path | None = None,
        identity: dict[str, Any] | None = None,
        on_progress: OnProgress | None = None,
        stage: str = "tune",
    ) -> None:
        self.model, self.work, self.settings, self.evaluate = model, work, settings, evaluate
        self.checkpoint, self.identity = checkpoint, identity or {}
        self.history = History()
        self.best: dict[str, torch.Tensor] | None = None  # kept only where patience asks for it
        self._taken: list[Batch] = []  # of the step at hand
        self._left: list[Batch] = []  # those of them that are still to be gone through
        self._stream = self._resume(saved, batches) if saved is not None else batches.batches()
        self._meter = ProgressMeter(stage, settings.steps, on_progress, done=self.history.steps)
        self._pace = CheckpointPace(settings.checkpoint_every)

    @property
    def done(self) -> bool:
        """Whether the last step was made, or patience ran out."""
        return self.history.steps >= self.settings.steps or self.history.stopped_early

    def next_batch(self) -> Batch:
        """The batch whose loss is due; with the first one of a step, all of the step's are drawn.

        Raises:
            DataError: the batches end, or no token of the step's has a label.
        """
        if not self._left:
            step = self.history.steps + 1
            self._taken = list(islice(self._stream, self.settings.accumulate))
            if len(self._taken) < self.settings.accumulate:
                raise DataError(f"Step {step}: the batches have come to an end.", "Give batches that start over.")
            self._left = self.work.begin(step, self._taken)
        return self._left[0]

    def passed(self) -> None:
        """Takes note that the batch's gradients are there; makes the step where it was the step's last.

        Raises:
            RunFailed: loss, gradient or evaluation is not finite.
            ResourcesMissing: the disk is too full for a checkpoint.
        """
        self._left.pop(0)
        if self._left:
            return
        loss = self.work.finish()
        self.history.losses.append(loss)
        step, settings = self.history.steps, self.settings
        last = step == settings.steps
        if settings.evaluate_every and (step % settings.evaluate_every == 0 or last):
            self._evaluate(step)
        if self.checkpoint is not None and (self._pace.due(step) or self.done):
            self._pace.write(partial(self._save, self.checkpoint, self._taken[-1]))
        self._meter.advance(tokens=sum(_tokens(batch) for batch in self._taken), loss=loss)

    def settle(self) -> None:
        """Makes the weights those that count: with patience the best ones, else the last."""
        if self.best is not None:
            self.work.weights.load(self.best)

    def _evaluate(self, step: int) -> None:
        assert self.evaluate is not None
        self.model.eval()
        try:
            with torch.no_grad():
                value = float(self.evaluate())
        finally:
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
        Checkpoint(self.identity, record, tensors).write(path)

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
