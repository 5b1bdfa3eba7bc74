"""Where a base model lies: a directory, a GGUF file, or a Hugging Face id brought to a directory; and its licence."""

from __future__ import annotations

import re
from pathlib import Path

import huggingface_hub
import yaml

from scaleot_ray.errors import ConfigError

# Weights as safetensors only: other formats are pickles, which are never loaded.
_WANTED = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model", "LICENSE*", "README.md"]
_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
UNKNOWN_LICENCE = "unknown (the model names no licence)"


def resolve_source(place: str, key: str, needs: tuple[str, ...]) -> Path:
    """A local directory, or a ``.gguf`` file, for what the user gave.

    Args:
        place: directory, ``.gguf`` file, or Hugging Face id. An id is looked up in the local cache first.
        key: setting it comes from (``model.path``, ``model.tokenizer``), for messages.
        needs: patterns of which a cached id must hold a file each, else it is downloaded.

    Raises:
        ConfigError: it is none of the three, or the id cannot be resolved.
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
    try:
        cached = Path(huggingface_hub.snapshot_download(place, allow_patterns=_WANTED, local_files_only=True))
        if all(any(cached.glob(pattern)) for pattern in needs):
            return cached
    except (OSError, ValueError):
        pass  # not in the cache; the download below says what is wrong with it
    try:
        return Path(huggingface_hub.snapshot_download(place, allow_patterns=_WANTED))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()
        raise ConfigError(
            f"{key}: {place!r} is neither a directory here nor a model id that could be fetched "
            f"({type(error).__name__}{': ' + reason[0] if reason else ''}).",
            "Check the spelling and the network, or give the path of a directory or .gguf file.",
        ) from None


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
