"""Base models: from a Hugging Face directory or id, or a GGUF file, to a frozen model in memory."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from scaleot_ray.config import ModelSettings
from scaleot_ray.errors import ConfigError, ResourcesMissing, UnsupportedArchitectureError
from scaleot_ray.families import family_of
from scaleot_ray.families.family import Family, text_config
from scaleot_ray.families.gguf import gguf_metadata
from scaleot_ray.families.sources import UNKNOWN_LICENCE, directory_licence, resolve_source
from scaleot_ray.families.tokenizer import load_tokenizer, read_tokenizer, tokenizer_files

# The code of models loads slowly, with torch's compiler and accelerate; who only reads configs and tensors, as the
# coordinator of a run does, never needs it.
if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "BaseModel",
    "empty_model",
    "load_base_model",
    "load_tokenizer",
    "model_digest",
    "resolve_device",
    "tokenizer_digest",
    "tokenizer_files",
]

# What a config says besides the architecture: where it was read, by which version, how it was stored.
_VOLATILE = (
    "_name_or_path",
    "_model_name_or_path",
    "architectures",
    "dtype",
    "torch_dtype",
    "quantization_config",
    "transformers_version",
    "use_cache",
)
# What a tokenizer's files say besides: where it was read, and how the last batch was filled up or cut.
_VOLATILE_TOKENIZER = ("is_local", "local_files_only", "padding", "truncation")


@dataclass
class BaseModel:
    """A base model with what belongs to it.

    Attributes:
        model: causal LM in eval mode, no parameter requires a gradient, no key/value cache.
        tokenizer: its fast tokenizer.
        family: where its layers live.
        source: what the user gave as ``model.path``.
        licence: licence notice: an identifier, or the text of the LICENSE file.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    family: Family
    source: str
    licence: str

    @property
    def name(self) -> str:
        """How artefacts call the model: its id, or the last part of a path, which says nothing of the machine."""
        path = Path(self.source).expanduser()
        return path.resolve().name if path.exists() else self.source

    @cached_property
    def digest(self) -> str:
        """:func:`model_digest` of the weights as they were loaded; computed once, since it reads them all."""
        return model_digest(self.model)

    @cached_property
    def tokenizer_digest(self) -> str:
        """:func:`tokenizer_digest` of its tokenizer, computed once."""
        return tokenizer_digest(self.tokenizer)


def load_base_model(settings: ModelSettings) -> BaseModel:
    """Loads weights and tokenizer; the architecture is checked before any weight is read.

    Raises:
        ConfigError: ``model.path`` leads to no model, its files are incomplete, damaged, quantised or no
            safetensors; or ``model.tokenizer`` is missing or larger than the model's embedding.
        UnsupportedArchitectureError: no family knows the architecture.
        ResourcesMissing: ``model.device`` names a GPU that is not there or too small.
    """
    device = resolve_device(settings.device)
    source = resolve_source(settings.path, "model.path", ("config.json", "*.safetensors"))
    if source.is_file():
        metadata = gguf_metadata(source)
        licence = str(metadata.get("general.license") or UNKNOWN_LICENCE)
        config = gguf_config(source, str(metadata.get("general.architecture")))
        options: dict[str, Any] = {"gguf_file": source.name}
    else:
        licence = directory_licence(source)
        config = directory_config(source)
        options = {"use_safetensors": True}
    family = family_of(config)
    tokenizer = read_tokenizer(settings.tokenizer or str(source))
    model = _read_weights(source, config, getattr(torch, settings.dtype), options)
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= rows:
        raise ConfigError(
            f"model.tokenizer: {settings.tokenizer or settings.path} has token ids up to {largest}, "
            f"the model's embedding has {rows} rows.",
            "Set model.tokenizer to the tokenizer this model was trained with.",
        )
    return BaseModel(_on(device, _frozen(model)), tokenizer, family, settings.path, settings.licence or licence)


def directory_config(directory: Path) -> Any:
    """The config of a model's directory; its weights need not be read.

    Raises:
        ConfigError: there is no valid config.json, or the weights are quantised.
        UnsupportedArchitectureError: no family knows the architecture.
    """
    remedy = "Give the directory that save_pretrained wrote: config.json, *.safetensors and the tokenizer."
    try:
        values = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"model.path: {directory} holds no config.json.", remedy) from None
    except OSError as error:
        raise ConfigError(
            f"model.path: {directory / 'config.json'} cannot be read ({error.strerror or error}).", remedy
        ) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"model.path: {directory / 'config.json'} is no valid JSON ({error}).", remedy) from None
    if not isinstance(values, dict) or "model_type" not in values:
        raise ConfigError(f"model.path: {directory / 'config.json'} names no model_type.", remedy)
    family_of(SimpleNamespace(model_type=values["model_type"]))
    if quantised := values.get("quantization_config"):
        method = quantised.get("quant_method", "unknown method") if isinstance(quantised, dict) else quantised
        raise ConfigError(
            f"model.path: the weights in {directory} are quantised ({method}).",
            "Give the unquantised checkpoint, or a .gguf file, which is unpacked on loading.",
        )
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # a config class may raise anything on values that it did not write
        raise ConfigError(f"model.path: {directory / 'config.json'} is refused: {error}", remedy) from None


def gguf_config(file: Path, architecture: str) -> Any:
    """The config that transformers makes of a GGUF file's header.

    Raises:
        UnsupportedArchitectureError: it knows no such architecture.
    """
    try:
        return AutoConfig.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    except (ValueError, KeyError, StrictDataclassError):
        raise UnsupportedArchitectureError(
            f"model.path: transformers cannot read the GGUF architecture {architecture!r} of {file}.",
            "Use the model's Hugging Face directory instead, or a GGUF file of a Llama-like architecture.",
        ) from None


def _read_weights(source: Path, config: Any, dtype: torch.dtype, options: dict[str, Any]) -> PreTrainedModel:
    directory = source.parent if source.is_file() else source
    remedy = "Give a complete model; weights must be *.safetensors (pickled .bin files are never loaded) or .gguf."
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            dtype=dtype,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ConfigError(f"model.path: the weights of {source} cannot be read: {error}", remedy) from None
    if report["missing_keys"]:
        # transformers would go on with random values in their place.
        names = ", ".join(sorted(report["missing_keys"])[:3])
        raise ConfigError(f"model.path: {source} holds no weights for {names} …", remedy)
    return model


def _frozen(model: PreTrainedModel) -> PreTrainedModel:
    # A GGUF model is dense once loaded, yet carries its quantizer, which save_pretrained refuses.
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        if name in vars(model):
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.use_cache = False
    # transformers leaves a head of its own untied, whatever the config says; an emulator ties by the config.
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    text_config(model.config).tie_word_embeddings = head is not None and head.weight is embedding.weight
    # The owner's path would travel inside every manifest.
    model.config._name_or_path = ""
    return model.eval().requires_grad_(False)


def _on(device: torch.device, model: PreTrainedModel) -> PreTrainedModel:
    try:
        return model.to(device)
    except torch.OutOfMemoryError:
        raise ResourcesMissing(
            f"model.device: the model does not fit on {device}.",
            "Set model.device to cpu or to a GPU with more memory, or model.dtype to bfloat16.",
        ) from None


def model_digest(model: PreTrainedModel) -> str:
    """SHA-256 (hex) over the architecture and every parameter: name, dtype, shape, bytes; tied ones once.

    Where and by which version of transformers the model was loaded or saved does not count.
    """
    values = {key: value for key, value in model.config.to_dict().items() if key not in _VOLATILE}
    digest = hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode())
    for name, parameter in sorted(model.named_parameters()):
        tensor = parameter.detach()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 (hex) over what :func:`tokenizer_files` say; where it was read and what it has done does not count."""
    files = {name: json.loads(data) for name, data in tokenizer_files(tokenizer).items()}
    plain = {
        name: {key: value for key, value in content.items() if key not in _VOLATILE_TOKENIZER}
        for name, content in files.items()
    }
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def resolve_device(device: str) -> torch.device:
    """The device of a ``device`` setting: ``cpu``, ``cuda``, ``cuda:N``; ``auto`` is a GPU where there is one.

    Raises:
        ResourcesMissing: a GPU is named that PyTorch does not see.
        ConfigError: it is no such device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        resolved = torch.device("meta")
    where = "device (--device, or model.device of a full model)"
    if resolved.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: {device!r} is no device.", f"Set {where} to auto, cpu, cuda or cuda:N.")
    seen = torch.cuda.device_count()
    if resolved.type == "cuda" and (resolved.index or 0) >= seen:
        others = f"or a GPU up to cuda:{seen - 1}" if seen else "or install a PyTorch with CUDA and a driver that fit"
        raise ResourcesMissing(
            f"device: {device} is asked for, PyTorch sees {seen} GPUs.", f"Set {where} to auto or cpu, {others}."
        )
    return resolved


def empty_model(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The architecture of ``config`` with parameters on the meta device and real buffers, frozen, in eval mode.

    Fill it with ``load_state_dict(…, assign=True)`` and tie again with ``tie_weights()``.
    """
    from accelerate import init_empty_weights

    config = copy.deepcopy(config)
    config.use_cache = False
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    return model.eval().requires_grad_(False)
