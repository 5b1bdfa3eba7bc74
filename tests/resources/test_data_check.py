"""What is wrong with a dataset is said before anything starts, as far as its first rows tell."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scaleot_ray.config import DataSettings, RunSettings
from scaleot_ray.errors import ConfigError, DataError, ScaleOTError
from scaleot_ray.federation.environment import look_here
from scaleot_ray.federation.run import run_local
from scaleot_ray.progress import Progress
from scaleot_ray.resources.data_check import LOOKED_AT
from tests.tiny_models import tiny_tokenizer
from tests.tiny_run import write_tiny_run

CHOICES = [{"prompt": "one of", "choices": ["the owner", "the data"], "label": index % 2} for index in range(5)]
CHAT = [{"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "other"}]}]


@pytest.fixture(autouse=True)
def nothing_starts(tmp_path: Path) -> Iterator[None]:
    """No test of this file gets as far as a folder for the run, let alone a Ray."""
    yield
    assert not (tmp_path / "run").exists()


def refused(settings: RunSettings, kind: type[ScaleOTError], match: str) -> None:
    """The run is refused and has not told of anything."""
    heard = list[Progress]()
    with pytest.raises(kind, match=match) as caught:
        run_local(settings, on_progress=heard.append)
    assert caught.value.remedy
    assert not heard


def with_data(settings: RunSettings, place: str, rows: list[dict[str, Any]], **changes: Any) -> RunSettings:
    """The settings with other rows in one place: ``public``, or one of the first tenant's datasets."""
    path = Path(settings.public.path).with_name("other.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataSettings(path=str(path), **changes)
    if place == "public":
        return settings.model_copy(update={"public": data})
    alice = settings.tenants[0].model_copy(update={place: data})
    return settings.model_copy(update={"tenants": (alice, *settings.tenants[1:])})


@pytest.mark.parametrize("place", ["public", "tenants.1.test", "tenants.1.validation"])
def test_missing_data_is_said_before_anything_starts(tmp_path: Path, place: str) -> None:
    settings = write_tiny_run(tmp_path, tune={"evaluate_every": 5})
    bob = settings.tenants[1]
    if place == "public":
        Path(settings.public.path).unlink()
    elif place == "tenants.1.test":
        Path(bob.test.path).unlink()
    else:
        bob = bob.model_copy(update={"validation": DataSettings(path=str(tmp_path / "gone.jsonl"))})
        settings = settings.model_copy(update={"tenants": (settings.tenants[0], bob)})
    refused(settings, DataError, rf"^{place}\.path: .* does not exist")


@pytest.mark.parametrize(
    ("place", "rows", "changes", "match"),
    [
        ("public", [{"body": "text"}], {}, r"^public: .*other.jsonl, line 1: there is no column 'text'.* 'body'"),
        ("train", [{"text": "one"}, {"text": 1}], {}, r"^tenants.0.train: .*line 2: column 'text' holds int"),
        ("train", CHOICES, {"task": "completion"}, r"^tenants.0.train: .*there is no column 'completion'"),
        (
            "test",
            [*CHOICES, {**CHOICES[0], "label": 2}],
            {"task": "choice"},
            r"^tenants.0.test: .*line 6: the label 2 in",
        ),
        ("test", [{"prompt": "one of", "choices": "two"}], {"task": "choice"}, r"^tenants.0.test: .*a list of texts"),
        ("test", CHOICES, {"task": "choice", "prompt_template": "{question}"}, r"^tenants.0.test: .*column 'question'"),
        ("test", CHOICES, {"task": "choice", "prompt_template": "{"}, r"^tenants.0.test.prompt_template: "),
        ("validation", [{"body": "text"}], {}, r"^tenants.0.validation: .*there is no column 'text'"),
        ("train", [], {}, r"^tenants.0.train: .*other.jsonl: the dataset is empty"),
    ],
)
def test_rows_that_are_not_what_the_settings_say(
    tmp_path: Path, place: str, rows: list[dict[str, Any]], changes: dict[str, Any], match: str
) -> None:
    settings = write_tiny_run(tmp_path, tune={"evaluate_every": 5})
    refused(with_data(settings, place, rows, **changes), DataError, match)


def test_a_tokenizer_without_a_chat_template(tmp_path: Path) -> None:
    settings = with_data(write_tiny_run(tmp_path), "train", CHAT, task="chat")
    look_here(settings)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "plain")
    model = settings.model.model_copy(update={"tokenizer": str(tmp_path / "plain")})
    refused(settings.model_copy(update={"model": model}), DataError, r"^tenants.0.train.task: chat needs a tokenizer")


def test_too_few_rows_to_keep_some_for_validation(tmp_path: Path) -> None:
    settings = write_tiny_run(tmp_path, tune={"evaluate_every": 5})
    few = with_data(settings, "train", [{"text": "one " * 40}])
    refused(few, DataError, r"^tenants.0.train: tune.validation_fraction: 0.1 of .* leaves none to evaluate on")


@pytest.mark.parametrize("key", ["stage_one.block_size", "tune.block_size", "tenants.1.tune.block_size"])
def test_blocks_longer_than_the_context(tmp_path: Path, key: str) -> None:
    settings = write_tiny_run(tmp_path)
    if key.startswith("tenants"):
        tune = settings.tune.model_validate({"block_size": 65})
        bob = settings.tenants[1].model_copy(update={"tune": tune})
        settings = settings.model_copy(update={"tenants": (settings.tenants[0], bob)})
    else:
        settings = write_tiny_run(tmp_path, **{key.partition(".")[0]: {"block_size": 65}})
    refused(settings, ConfigError, rf"^{key}: 65 tokens per sequence, but the model's context has 64")


def test_rows_that_nobody_reads_may_be_wrong(tmp_path: Path) -> None:
    settings = write_tiny_run(tmp_path, evaluate_examples=len(CHOICES))
    look_here(with_data(settings, "test", [*CHOICES, {}], task="choice"))
    many = CHOICES * LOOKED_AT
    look_here(with_data(settings, "train", [*many, {}], task="choice"))
