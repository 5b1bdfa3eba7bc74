"""Before a run starts: can its datasets be read as they will be? Better an error now than after an hour of stage 1."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from scaleot_ray.config import ModelSettings, OwnerSettings, RunSettings, TenantSettings, TuneSettings
from scaleot_ray.data import HoldOut, token_examples
from scaleot_ray.data.dataset_key import check_sources, dataset_key
from scaleot_ray.data.sources import find_sources
from scaleot_ray.families.tokenizer import read_tokenizer
from scaleot_ray.stages.limits import check_context
from scaleot_ray.stages.score import TestRows

LOOKED_AT = 64
"""Examples that are made of each dataset; what is wrong further on shows when it is used."""


def check_public(settings: OwnerSettings, context: int | None, tokenizer: PreTrainedTokenizerBase) -> None:
    """Makes the first public examples, just as stage 1 will.

    Args:
        settings: of the model owner.
        context: tokens of the model's longest sequence; None for one without bound.
        tokenizer: the model's.

    Raises:
        ConfigError: a block is longer than the context.
        DataError: the dataset is missing, or its rows are not what the settings say; names key, file and row.
    """
    check_sources({"public": settings.public})
    check_context(context, settings.stage_one.block_size, "stage_one.block_size")
    with dataset_key("public"):
        _make(token_examples(settings.public, tokenizer, settings.stage_one.block_size, "truncate"))


@dataclass(frozen=True)
class TenantCheck:
    """What is looked at of one data owner.

    Attributes:
        key: of its section, e.g. ``tenants.0``.
        tenant: its section.
        tune: how it tunes.
        evaluate_examples: as in the run's settings.
    """

    key: str
    tenant: TenantSettings
    tune: TuneSettings
    evaluate_examples: int | None

    def sources(self) -> int:
        """Looks whether its datasets are there; gives their bytes on disk.

        Raises:
            DataError: one is missing or of no known format; names the key.
        """
        tenant = self.tenant
        datasets = {"train": tenant.train, "test": tenant.test, "validation": tenant.validation}
        check_sources({f"{self.key}.{name}": data for name, data in datasets.items()})
        paths = {source.path for data in datasets.values() if data is not None for source in find_sources(data)}
        files = {file for path in paths for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()}
        return sum(file.stat().st_size for file in files)

    def rows(self, context: int | None, tokenizer: PreTrainedTokenizerBase) -> None:
        """Makes the first examples of its datasets, just as tuning and evaluation will.

        Raises:
            ConfigError: a block is longer than the context.
            DataError: rows are not what the settings say; names the key, the file and the row.
        """
        tenant, tune, key = self.tenant, self.tune, self.key
        own = tenant.tune is not None and "block_size" in tenant.tune.model_fields_set
        check_context(context, tune.block_size, f"{key}.tune.block_size" if own else "tune.block_size")
        limit = min(LOOKED_AT, self.evaluate_examples or LOOKED_AT)  # rows that nobody reads may be wrong
        size, too_long = tune.block_size, tune.too_long
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


def tenant_checks(settings: RunSettings) -> list[TenantCheck]:
    """What is looked at, by data owner."""
    return [
        TenantCheck(f"tenants.{index}", tenant, settings.tune_of(tenant), settings.evaluate_examples)
        for index, tenant in enumerate(settings.tenants)
    ]


def model_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerBase:
    """The tokenizer that rows become tokens with.

    Raises:
        ConfigError: the model has none that can be read.
    """
    return read_tokenizer(settings.tokenizer or settings.path)


def _make(examples: Iterable[object]) -> None:
    for _ in itertools.islice(examples, LOOKED_AT):
        pass
