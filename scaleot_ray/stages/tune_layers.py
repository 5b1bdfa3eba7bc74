"""The tuning of layers on a data owner's rows, of an emulator or of a full model: rows → batches → delta."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from scaleot_ray.config import DataSettings, TuneSettings
from scaleot_ray.data import HoldOut, TokenBatches, padding_id, token_examples
from scaleot_ray.data.dataset_key import dataset_key
from scaleot_ray.errors import ConfigError
from scaleot_ray.families import Family
from scaleot_ray.progress import OnProgress
from scaleot_ray.stages.limits import check_block_size, vocabulary_size
from scaleot_ray.stages.score import TestRows
from scaleot_ray.tuning import Delta, Tuned, tune


def tune_layers(
    model: Any,
    family: Family,
    positions: tuple[int, ...],
    tokenizer: Any,
    train: DataSettings,
    validation: DataSettings | None,
    settings: TuneSettings,
    evaluate_examples: int | None,
    stage: str,
    checkpoint: Path | None,
    resume: bool,
    on_progress: OnProgress | None,
    start: Delta | None = None,
    earlier_steps: int = 0,
) -> Tuned:
    """Tunes the layers at ``positions`` of an emulator or of a full model, on the same batches.

    Where ``settings`` ask for evaluations, they are made on ``validation``, or without it on rows of
    ``train`` that are then not trained on. Batches of ``earlier_steps``, those of earlier rounds, are passed over:
    rounds go through the rows one after the other, not each from the beginning.
    """
    batches, evaluate = tuning_rows(model, tokenizer, train, validation, settings, evaluate_examples, earlier_steps)
    return tune(
        model,
        family,
        positions,
        batches,
        settings,
        start=start,
        evaluate=evaluate,
        checkpoint=checkpoint,
        resume=resume,
        on_progress=on_progress,
        stage=stage,
    )


def tuning_rows(
    model: Any,
    tokenizer: Any,
    train: DataSettings,
    validation: DataSettings | None,
    settings: TuneSettings,
    evaluate_examples: int | None,
    earlier_steps: int = 0,
) -> tuple[TokenBatches, Callable[[], float] | None]:
    """Batches to tune on, and what evaluates ``model`` where ``settings`` ask for it; rows as :func:`tune_layers`.

    Raises:
        ConfigError: blocks are longer than the model's context, or nothing evaluates on ``validation``.
        DataError: rows cannot be read, or are not what the settings say.
    """
    check_block_size(model.config, settings.block_size, "tune.block_size")
    if validation is not None and settings.evaluate_every is None:
        raise ConfigError(
            "validation: nothing evaluates on these rows.", "Set tune.evaluate_every, or leave validation out."
        )
    hold_out = None
    if settings.evaluate_every is not None and validation is None:
        hold_out = HoldOut(settings.validation_fraction, settings.seed)
    block_size, too_long = settings.block_size, settings.too_long
    with dataset_key("train"):
        examples = token_examples(train, tokenizer, block_size, too_long, hold_out.training if hold_out else None)
    batches = TokenBatches(
        examples,
        settings.batch_size,
        padding_id(tokenizer),
        settings.seed,
        vocab_size=vocabulary_size(model),
        passed=earlier_steps * settings.accumulate,
    )
    with dataset_key("train"):
        batches.prepare(settings.steps * settings.accumulate)
    evaluate: Callable[[], float] | None = None
    if settings.evaluate_every is not None:
        part = hold_out.validation if hold_out else None
        with dataset_key("validation" if validation is not None else "train"):
            rows = TestRows(validation or train, tokenizer, block_size, evaluate_examples, too_long, part=part)
        evaluate = lambda: rows.loss(model)  # noqa: E731
    return batches, evaluate
