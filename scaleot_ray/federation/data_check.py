"""Before a run starts: can its datasets be read as they will be? Better an error now than after an hour of stage 1."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from scaleot_ray.config import DataSettings, RunSettings
from scaleot_ray.data import HoldOut, token_examples
from scaleot_ray.data.dataset_key import check_sources, dataset_key
from scaleot_ray.families.tokenizer import read_tokenizer
from scaleot_ray.stages.limits import check_context
from scaleot_ray.stages.score import TestRows

LOOKED_AT = 64
"""Examples that are made of each dataset; what is wrong further on shows when it is used."""


def check_data(settings: RunSettings) -> None:
    """Looks whether every dataset is there.

    Raises:
        DataError: one is missing or of no known format; names the key.
    """
    datasets: dict[str, DataSettings | None] = {"public": settings.public}
    for index, tenant in enumerate(settings.tenants):
        datasets |= {f"tenants.{index}.train": tenant.train, f"tenants.{index}.test": tenant.test}
        datasets[f"tenants.{index}.validation"] = tenant.validation
    check_sources(datasets)


def check_rows(settings: RunSettings, context: int | None) -> None:
    """Makes the first examples of every dataset, just as stage 1, tuning and evaluation will.

    Args:
        settings: the run.
        context: tokens of the model's longest sequence; None for one without bound.

    Raises:
        ConfigError: a block is longer than the context, or the model has no tokenizer that can be read.
        DataError: rows are not what the settings say; names the key, the file and the row.
    """
    tunes = [settings.tune_of(tenant) for tenant in settings.tenants]
    check_context(context, settings.stage_one.block_size, "stage_one.block_size")
    for index, (tenant, tune) in enumerate(zip(settings.tenants, tunes, strict=True)):
        own = tenant.tune is not None and "block_size" in tenant.tune.model_fields_set
        check_context(context, tune.block_size, f"tenants.{index}.tune.block_size" if own else "tune.block_size")
    tokenizer = read_tokenizer(settings.model.tokenizer or settings.model.path)
    with dataset_key("public"):
        _make(token_examples(settings.public, tokenizer, settings.stage_one.block_size, "truncate"))
    limit = min(LOOKED_AT, settings.evaluate_examples or LOOKED_AT)  # rows that nobody reads may be wrong
    for index, (tenant, tune) in enumerate(zip(settings.tenants, tunes, strict=True)):
        key, size, too_long = f"tenants.{index}", tune.block_size, tune.too_long
        held_out = None
        if tune.evaluate_every is not None and tenant.validation is None:
            held_out = HoldOut(tune.validation_fraction, tune.seed)
        with dataset_key(f"{key}.train"):
            _make(token_examples(tenant.train, tokenizer, size, too_long, held_out.training if held_out else None))
            if held_out is not None:
                TestRows(tenant.train, tokenizer, size, 1, too_long, part=held_out.validation)
        with dataset_key(f"{key}.test"):
            TestRows(tenant.test, tokenizer, size, limit, too_long)
        if tenant.validation is not None:
            with dataset_key(f"{key}.validation"):
                TestRows(tenant.validation, tokenizer, size, limit, too_long)


def _make(examples: Iterable[object]) -> None:
    for _ in itertools.islice(examples, LOOKED_AT):
        pass
