"""What whole runs are measured on: a random Llama, random text, and one emulator that all runs reuse."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.random_text import VOCABULARY, random_tokenizer, write_random_text
from scaleot_ray.artifacts.crossing import crossing_bytes
from scaleot_ray.artifacts.manifest import Manifest
from scaleot_ray.config import RunSettings, TuneSettings, parse
from scaleot_ray.errors import ConfigError
from scaleot_ray.families.size import model_size
from scaleot_ray.federation.folder import RunFolder
from scaleot_ray.federation.preflight import preflight
from scaleot_ray.resources.machine import this_machine
from scaleot_ray.resources.needs import run_needs
from scaleot_ray.resources.session import ray_is_given
from scaleot_ray.stages.build import build

PLUG_IN_LAYERS = 4

_HEAD = 64  # values of an attention head
_OUTPUTS = ("emulator", "model_owner")  # of a run's folder: what the next run finds there and reuses


def random_llama(hidden: int, layers: int) -> Any:
    """A random Llama in fp32: an MLP four times as wide as ``hidden``, 256 tokens.

    Raises:
        ConfigError: there are too few layers for an emulator, or the width cannot be split into heads.
    """
    if layers < PLUG_IN_LAYERS + 2:
        raise ConfigError(
            f"--layers: {layers} are too few; {PLUG_IN_LAYERS} are tuned, and half of the others are replaced.",
            f"Give {PLUG_IN_LAYERS + 2} or more.",
        )
    heads = max(2, hidden // _HEAD)
    if hidden < 1 or hidden % (2 * heads):
        raise ConfigError(f"--hidden: {hidden} is no width of {heads} heads.", f"Give a multiple of {_HEAD}.")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).eval()


class Subject:
    """The model, the text and the emulator of a benchmark's runs.

    Args:
        folder: for all of it, and for the folders of the runs.
        hidden, layers: of the model, see :func:`random_llama`.
        tune: how every data owner tunes, with one processor.

    Attributes:
        emulator: manifest of the emulator, which is built here, once; its harmonizers are untrained.

    Raises:
        ConfigError: no such model, or a Ray is given: processes of others would be measured.
    """

    def __init__(self, folder: Path, hidden: int, layers: int, tune: TuneSettings) -> None:
        model = random_llama(hidden, layers)
        if ray_is_given():
            raise ConfigError("RAY_ADDRESS: these runs are measured on a Ray of their own.", "Unset RAY_ADDRESS.")
        self._folder, self._tune = folder, tune
        self._facts = {"hidden": hidden, "layers": layers, "parameters": model.num_parameters()}
        model.save_pretrained(folder / "model")
        random_tokenizer().save_pretrained(folder / "model")
        write_random_text(folder / "public.jsonl", tune.block_size, seed=0)
        settings, place = self._settings(1, folder / "built"), RunFolder(folder / "built")
        self.emulator: Manifest = build(
            settings.model,
            settings.public,
            settings.stage_one,
            settings.emulator,
            place.emulator,
            cache=place.model_owner,
        ).manifest

    def as_json(self) -> dict[str, Any]:
        """What the runs are of, for the JSON: ``model``, ``tune``, ``emulator``."""
        tune = {key: getattr(self._tune, key) for key in ("method", "steps", "batch_size", "block_size")}
        return {"model": self._facts, "tune": tune, "emulator": {"bytes": crossing_bytes(self.emulator)}}

    def check_room(self, tenants: int) -> None:
        """Whether this machine has room for a run of so many data owners, before any is made.

        Raises:
            ResourcesMissing: it has not; says what is missing.
        """
        settings = self._settings(tenants, self._folder / "largest")
        preflight(settings, run_needs(settings, model_size(settings.model)), this_machine())

    @contextmanager
    def run_of(self, tenants: int) -> Iterator[RunSettings]:
        """Settings of a run of ``tenants`` data owners, in a folder with the emulator; it goes with the block."""
        with tempfile.TemporaryDirectory(prefix="run-", dir=self._folder) as output:
            for name in _OUTPUTS:
                shutil.copytree(self._folder / "built" / name, Path(output, name))
            yield self._settings(tenants, Path(output))

    def _settings(self, tenants: int, output: Path) -> RunSettings:
        names = [f"owner-{number:02}" for number in range(1, tenants + 1)]
        for number, name in enumerate(names, start=1):
            write_random_text(self._folder / f"{name}.jsonl", self._tune.block_size, seed=number)
        rows = {name: {"path": str(self._folder / f"{name}.jsonl")} for name in names}
        stage_one = {"start": "random", "score_start": "zero", "steps": 0, "batch_size": 1, "generated_tokens": 0}
        block = {"block_size": self._tune.block_size, "start_tokens": self._tune.block_size}
        values: dict[str, Any] = {
            "model": {"path": str(self._folder / "model"), "device": "cpu"},
            "public": {"path": str(self._folder / "public.jsonl")},
            "stage_one": {**stage_one, **block, "harmonizer_rank": 8},
            "emulator": {"alpha": 0.5, "beta": 0.5, "plug_in_layers": PLUG_IN_LAYERS, "fit_tokens": 0},
            "tune": self._tune.model_dump(),
            "aggregation": {"method": "mean"},
            "tenants": [{"name": name, "train": rows[name], "test": rows[name], "cpus": 1} for name in names],
            "owner_cpus": 1,
            "evaluate_examples": 2,
            "output": str(output),
        }
        return parse(RunSettings, values)
