"""The tokenizer as files that travel inside an artefact, and back."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Container
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from scaleot_ray.errors import ArtifactRefused, ConfigError
from scaleot_ray.families.sources import resolve_source

_CONFIG = "tokenizer_config.json"
_FILES = ("tokenizer.json", _CONFIG)
# What makes up a tokenizer beside tokenizer.json; all else in its config is its owner's business.
_KEPT = {
    *("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens"),
    *("add_bos_token", "add_eos_token", "add_prefix_space", "clean_up_tokenization_spaces", "split_special_tokens"),
    *("backend", "chat_template", "chat_control_tokens", "response_template", "model_input_names", "tokenizer_class"),
    *("model_max_length", "padding_side", "truncation_side"),
}


def read_tokenizer(place: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory, Hugging Face id or GGUF file.

    Raises:
        ConfigError: there is none, or it has no fast (``tokenizer.json``) form.
    """
    source = resolve_source(place, "model.tokenizer", ("tokenizer*|vocab*",))
    remedy = "Set model.tokenizer to a directory that holds tokenizer.json, or to a model id that has one."
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    try:
        if source.is_file():
            tokenizer = _as_in_file(AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, **options))
        elif not any(source.glob("tokenizer*")) and not any(source.glob("vocab*")):
            # transformers would make up an empty tokenizer for some model types.
            raise ConfigError(f"model.tokenizer: {source} holds no tokenizer.", remedy)
        else:
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ConfigError(f"model.tokenizer: {source} holds no tokenizer that can be read ({error}).", remedy) from None
    if not tokenizer.is_fast:
        raise ConfigError(
            f"model.tokenizer: {type(tokenizer).__name__} of {source} has no fast form (tokenizer.json).", remedy
        )
    return tokenizer


def _as_in_file(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    # transformers gives some GGUF tokenizers a token of its own (<|endoftext|>) behind the last one of
    # the file, for which the model has no embedding.
    files = tokenizer_files(tokenizer)
    content = json.loads(files["tokenizer.json"])
    vocabulary = content["model"]["vocab"]
    known = set(vocabulary) if isinstance(vocabulary, dict) else {token for token, _ in vocabulary}
    kept = [token for token in content["added_tokens"] if token["content"] in known]
    if len(kept) == len(content["added_tokens"]):
        return tokenizer
    content["added_tokens"] = kept
    return load_tokenizer({**files, "tokenizer.json": json.dumps(content).encode()})


def tokenizer_files(tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """``tokenizer.json`` and ``tokenizer_config.json`` (chat template inside) as bytes by file name.

    Of the config only what the tokenizer is made of, whatever else its owner's file says.
    """
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory, save_jinja_files=False)
        files = {name: Path(directory, name).read_bytes() for name in _FILES}
    config = _made_of(json.loads(files[_CONFIG]), tokenizer.get_vocab())
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    return {**files, _CONFIG: text.encode()}


def _made_of(config: dict[str, Any], vocabulary: Container[str]) -> dict[str, Any]:
    """The keys of a tokenizer's config that make it up; of special tokens those that it knows."""

    def token(key: str, value: Any) -> bool:
        content = value.get("content") if isinstance(value, dict) else value
        return key.endswith("_token") and isinstance(content, str) and content in vocabulary

    return {key: value for key, value in config.items() if key in _KEPT or token(key, value)}


def load_tokenizer(files: dict[str, bytes]) -> PreTrainedTokenizerBase:
    """The tokenizer out of an artefact's files; other files in ``files`` are left alone.

    The class named in the files is not looked up: ``tokenizer.json`` says all there is to tokenizing,
    and what a party sends must not choose the code that runs. Keys that make up no tokenizer are left out.

    Raises:
        ArtifactRefused: a file is missing or unreadable.
    """
    remedy = "Ask the model owner to build the emulator again."
    for name in _FILES:
        if name not in files:
            raise ArtifactRefused(f"The artefact holds no {name}.", remedy)
    try:
        sent = json.loads(files[_CONFIG])
        config = {key: value for key, value in sent.items() if key in _KEPT or key.endswith("_token")}
    except (ValueError, AttributeError, RecursionError) as error:
        raise ArtifactRefused(f"{_CONFIG} cannot be read ({error}).", remedy) from None
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, _FILES[0]).write_bytes(files[_FILES[0]])
        Path(directory, _CONFIG).write_text(json.dumps(config), encoding="utf-8")
        try:
            return PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
        # The tokenizers library raises bare Exception for a damaged file.
        except Exception as error:
            raise ArtifactRefused(f"tokenizer.json cannot be read ({error}).", remedy) from None
