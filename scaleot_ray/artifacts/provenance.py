"""Where an artefact comes from: the base model's name and its licence notice.

Both are texts that one party writes and others read, so they are kept short and plain: no path of a
machine, no control characters that a terminal would obey, no invisible ones that hide something.
"""

from __future__ import annotations

import unicodedata

from scaleot_ray.artifacts.untrusted import quoted
from scaleot_ray.errors import ArtifactRefused

NAME_LIMIT = 128
"""Characters of the longest model name."""
LICENCE_LIMIT = 16 << 10
"""Bytes (UTF-8) of the longest licence notice in a manifest; the Apache licence has 11 kB."""
LICENCE_FILE = "LICENSE"

_CUT = f"\n[…] cut here: the whole text is in the file {LICENCE_FILE} of the emulator."
_REMEDY = "Ask the sender for the artefact as scaleot_ray wrote it; it writes short and plain notices."


def model_name(name: str) -> str | None:
    """``name`` as artefacts carry it: unusual characters as ``_``, and only the beginning of a long one."""
    plain = "".join(character if _in_name(character) else "_" for character in name.strip()[:NAME_LIMIT])
    if plain.strip("/").count("/") > 1 or plain.startswith("/"):  # a path, and a model's id has two parts at most
        plain = plain.strip("/").rsplit("/", 1)[-1]
    return plain.strip("./~ ") or None


def licence_notice(text: str) -> str | None:
    """A licence as manifests and cards carry it: readable characters only, and a long one cut, with a note."""
    plain = "".join(character for character in "\n".join(text.splitlines()) if _in_licence(character)).strip()
    if len(plain.encode()) > LICENCE_LIMIT:
        plain = plain.encode()[: LICENCE_LIMIT - len(_CUT.encode())].decode(errors="ignore").rstrip() + _CUT
    return plain or None


def licence_files(text: str) -> dict[str, bytes]:
    """The whole licence as a file of the emulator, where :func:`licence_notice` had to cut it."""
    notice = licence_notice(text)
    return {LICENCE_FILE: text.encode(errors="replace")} if notice is not None and notice.endswith(_CUT) else {}


def check_model_name(name: str) -> None:
    """Refuses a name that is long, a path or no plain text.

    Raises:
        ArtifactRefused: says what is wrong with ``base_model``.
    """
    if not 0 < len(name) <= NAME_LIMIT:
        raise ArtifactRefused(f"base_model has {len(name)} characters, expected 1 to {NAME_LIMIT}.", _REMEDY)
    odd = next((character for character in name if not _in_name(character)), None)
    if odd is not None:
        raise ArtifactRefused(f"base_model has the character {odd!a}, which a model's name does not have.", _REMEDY)
    if name[0] in "./~ " or name.count("/") > 1:
        raise ArtifactRefused(f"base_model is {quoted(name)}: a path, not a model's name.", _REMEDY)


def check_licence(text: str) -> None:
    """Refuses a licence notice that is long or no plain text.

    Raises:
        ArtifactRefused: says what is wrong with ``licence``.
    """
    odd = next((character for character in text if not _in_licence(character)), None)
    if odd is not None:
        raise ArtifactRefused(f"licence has the character {odd!a}, which no readable text has.", _REMEDY)
    size = len(text.encode())
    if not 0 < size <= LICENCE_LIMIT:
        raise ArtifactRefused(f"licence has {size} bytes, expected 1 to {LICENCE_LIMIT}.", _REMEDY)


def _in_name(character: str) -> bool:
    return character.isprintable() and character not in '\\`<>"|*?:'


def _in_licence(character: str) -> bool:
    # Control characters, invisible formatting (writing direction), surrogates, private use.
    return character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co")
