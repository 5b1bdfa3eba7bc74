"""Base models by Hugging Face id: taken from the local cache without the network, refused where they are incomplete."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from scaleot_ray.config import ModelSettings
from scaleot_ray.errors import ConfigError
from scaleot_ray.families.loading import load_base_model, model_digest, tokenizer_files
from scaleot_ray.families.size import model_size
from scaleot_ray.families.sources import resolve_source
from scaleot_ray.families.tokenizer import read_tokenizer
from tests.tiny_models import save_tiny, tiny_model, tiny_tokenizer, tiny_tokens

ID = "tiny-owner/tiny-model"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "home" / "hub"


def _cached(hub: Path, directory: Path, name: str = ID) -> Path:
    """Puts a directory's files into the cache the way a download does; gives the snapshot's folder."""
    repository, commit = hub / f"models--{name.replace('/', '--')}", "0123456789abcdef0123456789abcdef01234567"
    snapshot = repository / "snapshots" / commit
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for file in directory.iterdir():
        blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(Path(os.path.relpath(blob, snapshot)))
    return snapshot


def _sharded(directory: Path) -> Path:
    tiny_model("llama").save_pretrained(directory, max_shard_size="50KB")
    tiny_tokenizer().save_pretrained(directory)
    assert len(list(directory.glob("*.safetensors"))) > 2
    return directory


def _refused(**settings: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_base_model(ModelSettings(**{"path": ID, "device": "cpu", **settings}))
    assert ID in caught.value.problem
    return caught.value


@pytest.mark.parametrize("sharded", [False, True])
@torch.no_grad()
def test_an_id_is_loaded_from_the_cache(hub: Path, tmp_path: Path, sharded: bool) -> None:
    snapshot = _cached(hub, (_sharded if sharded else save_tiny)(tmp_path / "made"))
    base = load_base_model(ModelSettings(path=ID, device="cpu"))
    assert base.name == base.source == ID
    assert model_digest(base.model) == model_digest(tiny_model("llama"))
    assert torch.equal(base.model(tiny_tokens()).logits, tiny_model("llama")(tiny_tokens()).logits)
    assert base.tokenizer("the owner")["input_ids"] == tiny_tokenizer()("the owner")["input_ids"]
    # What artefacts carry says nothing of the machine.
    assert str(tmp_path) not in str(base.model.config.to_dict())
    assert not any(str(tmp_path).encode() in content for content in tokenizer_files(base.tokenizer).values())
    assert model_size(ModelSettings(path=ID)).layers == 8
    assert resolve_source(ID, "model.path", ("config.json", "*.safetensors")) == snapshot


def test_the_cache_is_found_where_the_environment_says(tmp_path: Path) -> None:
    snapshot = _cached(tmp_path / "home" / "hub", save_tiny(tmp_path / "made"))
    shown = subprocess.run(
        [sys.executable, "-c", _RESOLVE, ID],
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.strip() == str(snapshot)


_RESOLVE = """
import sys
from scaleot_ray.families.sources import resolve_source
print(resolve_source(sys.argv[1], "model.path", ("config.json", "*.safetensors")))
"""


def test_an_id_that_is_not_in_the_cache_is_refused(hub: Path) -> None:
    assert "could be fetched" in _refused().problem


@pytest.mark.parametrize("lost", ["config.json", "model.safetensors"])
def test_an_incomplete_download_is_refused_by_what_is_missing(hub: Path, tmp_path: Path, lost: str) -> None:
    snapshot = _cached(hub, save_tiny(tmp_path / "made"))
    (snapshot / lost).unlink()
    error = _refused()
    assert f"model.path: {ID!r} is incomplete" in error.problem
    assert ("*.safetensors" if lost == "model.safetensors" else lost) in error.problem
    assert "HF_HUB_OFFLINE" in error.remedy
    assert str(tmp_path) not in error.problem


def test_a_file_whose_content_never_came_is_missing(hub: Path, tmp_path: Path) -> None:
    snapshot = _cached(hub, save_tiny(tmp_path / "made"))
    (snapshot / "model.safetensors").resolve().unlink()
    assert "*.safetensors" in _refused().problem


def test_every_shard_that_the_index_names_is_wanted(hub: Path, tmp_path: Path) -> None:
    snapshot = _cached(hub, _sharded(tmp_path / "made"))
    shard = sorted(snapshot.glob("*.safetensors"))[1]
    shard.unlink()
    assert shard.name in _refused().problem
    (snapshot / "model.safetensors.index.json").unlink()
    (snapshot / "model.safetensors.index.json").write_text("{ broken")
    assert "model.safetensors.index.json" in _refused().problem


def test_a_tokenizer_by_id_needs_no_weights(hub: Path, tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "made")
    snapshot = _cached(hub, tmp_path / "made")
    assert not list(snapshot.glob("*.safetensors"))
    assert len(read_tokenizer(ID)) == 97
    tiny_model("llama").save_pretrained(tmp_path / "model")
    base = load_base_model(ModelSettings(path=str(tmp_path / "model"), tokenizer=ID, device="cpu"))
    assert len(base.tokenizer) == 97
    for file in snapshot.glob("tokenizer*"):
        file.unlink()
    error = _refused(path=str(tmp_path / "model"), tokenizer=ID)
    assert f"model.tokenizer: {ID!r} is incomplete" in error.problem


def test_weights_are_fetched_only_where_they_are_needed(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    download = huggingface_hub.snapshot_download

    def recorded(name: str, **options: Any) -> str:
        asked.append(options["allow_patterns"])
        return download(name, **options)

    monkeypatch.setattr("huggingface_hub.snapshot_download", recorded)
    for needs in (("tokenizer*|vocab*",), ("config.json", "*.safetensors")):
        with pytest.raises(ConfigError):
            resolve_source(ID, "model.path", needs)
    # Each is looked for in the cache, then on the network.
    assert ["*.safetensors" in patterns for patterns in asked] == [False, False, True, True]
    assert all("*.json" in patterns for patterns in asked)
