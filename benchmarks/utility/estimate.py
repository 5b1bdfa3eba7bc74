"""How much there is to compute, said before it begins: tokens through a model, and minutes at known rates."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.utility.cell import Cell
from scaleot_ray.config import DataSettings, StageOneSettings, TuneSettings
from scaleot_ray.data import TokenBatches, choice_examples, padding_id, token_examples
from scaleot_ray.emulator.layer_map import middle_layers, plug_in_positions, replaced_count
from scaleot_ray.families import layer_count
from scaleot_ray.families.loading import BaseModel
from scaleot_ray.stages.public_text import HELD_OUT

FORWARD = 320
"""Tokens/s of SmolLM2-135M forward, on 2 cores."""

FORWARD_BACKWARD = 160
"""The same with a backward pass (130 to 200, depending on where the trained layers are)."""

_BATCHES = 20


@dataclass(frozen=True)
class TaskTokens:
    """Tokens of one task.

    Attributes:
        tuning: of one tuning run, padding included.
        evaluation: of one pass over the test rows.
    """

    tuning: int
    evaluation: int


def tokens_per_step(base: BaseModel, train: DataSettings, tune: TuneSettings) -> float:
    """Tokens of an optimizer step, padding included: the mean over the first batches."""
    examples = token_examples(train, base.tokenizer, tune.block_size, tune.too_long)
    batches = TokenBatches(examples, tune.batch_size, padding_id(base.tokenizer), tune.seed)
    seen = itertools.islice(batches, _BATCHES)
    return tune.accumulate * sum(batch["input_ids"].numel() for batch in seen) / _BATCHES


def task_tokens(base: BaseModel, train: DataSettings, test: DataSettings, tune: TuneSettings, limit: int) -> TaskTokens:
    """Counts one tuning run (from its first batches) and one evaluation."""
    tuning = round(tokens_per_step(base, train, tune) * tune.steps)
    if test.task != "choice":
        return TaskTokens(tuning, limit * tune.block_size)
    questions = choice_examples(test, base.tokenizer, tune.block_size, tune.too_long)
    # As evaluate_choice runs them: an answer's last token is predicted, never read.
    read = sum(
        len(question.context) + len(answer)
        for question in questions
        for answer in {tuple(tokens[:-1]) for tokens in question.continuations}
    )
    return TaskTokens(tuning, read)


def cell_minutes(cell: Cell, tokens: TaskTokens, layers: int) -> float:
    """Minutes of one cell: its emulator fitted, tuned, and measured before, after and plugged in."""
    middle = len(middle_layers(layers, plug_in_positions(layers, cell.emulator.plug_in_layers)))
    share = 1 - replaced_count(middle, cell.emulator.alpha) / layers
    tuning = share * tokens.tuning / FORWARD_BACKWARD
    fit = cell.emulator.fit_tokens if cell.trains_harmonizers else 0
    return (tuning + (fit + (2 * share + 1) * tokens.evaluation) / FORWARD) / 60


def full_minutes(tokens: TaskTokens, all_layers: bool) -> float:
    """Minutes of the full model's rows for one task and seed: measured, tuned, measured.

    Args:
        tokens: of the task.
        all_layers: tuned and measured once more, with every layer tuned.
    """
    tuning = tokens.tuning / FORWARD_BACKWARD + tokens.evaluation / FORWARD
    return ((2 if all_layers else 1) * tuning + tokens.evaluation / FORWARD) / 60


def stage_one_minutes(settings: StageOneSettings, layers: int) -> float:
    """Minutes of one stage 1, which all tasks and triplets of a seed share."""
    batch = settings.batch_size * settings.block_size
    damage = layers * batch if settings.score_start == "single_layer" else 0
    teacher = settings.steps * batch if settings.objective == "distill" else 0
    candidates = settings.steps // settings.score_every * settings.candidates * batch / 2
    held_out = 3 * HELD_OUT * settings.block_size
    forward = settings.generated_tokens + settings.start_tokens + damage + teacher + candidates + held_out
    return (forward / FORWARD + settings.steps * batch / 2 / FORWARD_BACKWARD) / 60


def budget_lines(
    cells: Sequence[Cell], tokens: dict[str, TaskTokens], stages: Sequence[StageOneSettings], base: BaseModel
) -> list[str]:
    """What is about to be computed, a line per task and one for stage 1.

    Args:
        cells: all cells of the run.
        tokens: by task.
        stages: the stage-1 results that are needed.
        base: the full model.
    """
    layers = layer_count(base.model.config)
    lines, total = [], 0.0
    for task, found in tokens.items():
        own = [cell for cell in cells if cell.task == task]
        seeds = len({cell.seed for cell in own})
        full = seeds * full_minutes(found, any(cell.all_layers for cell in own))
        minutes = sum(cell_minutes(cell, found, layers) for cell in own) + full
        total += minutes
        lines.append(
            f"{task}: {found.tuning:,} tokens a tuning run, {found.evaluation:,} an evaluation; "
            f"{len(own)} cells, about {minutes / seeds:.0f} minutes a seed"
        )
    minutes = sum(stage_one_minutes(settings, layers) for settings in stages)
    lines.append(f"stage 1: {len(stages)} times, about {minutes:.0f} minutes")
    total += minutes
    lines.append(
        f"in all about {total / 60:.1f} hours if nothing is done yet, at {FORWARD} tokens/s forward and "
        f"{FORWARD_BACKWARD} with backward (SmolLM2-135M on 2 cores)"
    )
    return lines
