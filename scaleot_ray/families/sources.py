"""Where a base model lies: a directory, a GGUF file, or a Hugging Face id brought to a directory; and its licence."""

from __future__ import annotations

import json
import re
from pathlib import Path

import huggingface_hub
import yaml

from scaleot_ray.errors import ConfigError

# Weights as safetensors only: other formats are pickles, which are never loaded.
_WEIGHTS = "*.safetensors"
_BESIDE_WEIGHTS = ["*.json", "*.txt", "*.jinja", "*.model", "LICENSE*", "README.md"]
_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
UNKNOWN_LICENCE = "unknown (the model names no licence)"


def resolve_source(place: str, key: str, needs: tuple[str, ...]) -> Path:
    """A local directory, or a ``.gguf`` file, for what the user gave.

    Args:
        place: directory, ``.gguf`` file, or Hugging Face id. An id is looked up in the local cache first.
        key: setting it comes from (``model.path``, ``model.tokenizer``), for messages.
        needs: patterns of which an id's files must match one each (``a*|b*``: one of the two); where the cache
            lacks one, the id is downloaded. Weights are fetched only where ``*.safetensors`` is among them.

    Raises:
        ConfigError: it is none of the three, or the id cannot be resolved or is incomplete.
    """
    path = Path(place).expanduser()
    if path.is_dir():
        return path
    if path.suffix.lower() == ".gguf":
        if path.is_file():
            return path
        raise ConfigError(f"{key}: the file {place} does not exist.", "Give the path of a .gguf file.")
    if path.exists():
        raise ConfigError(
            f"{key}: {place} is neither a directory nor a .gguf file.",
            "Give the directory that holds config.json and the *.safetensors files, or a .gguf file.",
        )
    if not _ID.fullmatch(place):
        raise ConfigError(f"{key}: the directory {place} does not exist.", "Check the path.")
    return _snapshot(place, key, needs)


def _snapshot(name: str, key: str, needs: tuple[str, ...]) -> Path:
    wanted = [*_BESIDE_WEIGHTS, *(pattern for pattern in needs if pattern == _WEIGHTS)]
    try:
        cached = Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted, local_files_only=True))
        if not _missing(cached, needs):
            return cached
    except (OSError, ValueError):
        pass  # not in the cache; the download below says what is wrong with it
    try:
        fetched = Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()
        raise ConfigError(
            f"{key}: {name!r} is neither a directory here nor a model id that could be fetched "
            f"({type(error).__name__}{': ' + reason[0] if reason else ''}).",
            "Check the spelling and the network, or give the path of a directory or .gguf file.",
        ) from None
    # Without a network, huggingface_hub gives whatever an interrupted download left.
    missing = _missing(fetched, needs)
    if missing:
        raise ConfigError(
            f"{key}: {name!r} is incomplete: {', '.join(missing[:3])} missing or damaged.",
            "Run again with a network and without HF_HUB_OFFLINE, which completes the download; a model id that has "
            "no *.safetensors cannot be used (pickled .bin files are never loaded).",
        )
    return fetched


def _missing(snapshot: Path, needs: tuple[str, ...]) -> list[str]:
    """Of ``needs`` what no file matches; where weights are sharded, also the shards that their index names."""

    def found(need: str) -> bool:
        # A link whose content never came is no file.
        return any(path.is_file() for pattern in need.split("|") for path in snapshot.glob(pattern))

    missing = [need for need in needs if not found(need)]
    index = snapshot / "model.safetensors.index.json"
    if _WEIGHTS in needs and index.is_file() and not (snapshot / "model.safetensors").is_file():
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            return [*missing, index.name]
        missing += sorted(shard for shard in shards if not (snapshot / shard).is_file())
    return missing


def directory_licence(directory: Path) -> str:
    """Licence identifier from the model card's front matter, else the text of the LICENSE file."""
    card = directory / "README.md"
    if card.is_file():
        front = re.match(r"---\s*\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
        try:
            values = yaml.safe_load(front.group(1)) if front else None
        except yaml.YAMLError:
            values = None  # a card with broken front matter names no licence
        if isinstance(values, dict):
            identifier = values.get("license_name") or values.get("license")
            if identifier and identifier != "other":
                return str(identifier)
    for name in ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE"):
        if (directory / name).is_file():
            return (directory / name).read_text(encoding="utf-8", errors="replace").strip()
    return UNKNOWN_LICENCE
