"""Plain values as typed settings: from YAML, with overrides, and with errors that name the key."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from scaleot_ray.config.settings import Settings
from scaleot_ray.errors import ConfigError

Section = TypeVar("Section", bound=Settings)


def parse(section: type[Section], values: dict[str, Any], source: str = "settings") -> Section:
    """Values as a typed section.

    Args:
        section: the class to build, e.g. :class:`RunSettings`.
        values: nested plain values, as YAML or JSON gives them.
        source: the file or option the values come from, for messages.

    Raises:
        ConfigError: a key is unknown (with the nearest known one), missing, or its value is not
            what the key takes; the message has the full key.
    """
    try:
        return section.model_validate(values)
    except ValidationError as error:
        # A misspelt key is unknown and leaves the right one missing: the unknown one says more.
        errors = error.errors()
        first = next((item for item in errors if item["type"] == "extra_forbidden"), errors[0])
        key = ".".join(str(part) for part in first["loc"]) or "the file"
        if first["type"] == "extra_forbidden":
            known = _known_keys(section, first["loc"][:-1])
            near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known keys there: {', '.join(sorted(known))}."
            raise ConfigError(f"{source}: unknown key {key!r}.", hint) from None
        if first["type"] == "missing":
            raise ConfigError(f"{source}: {key!r} is missing.", f"Add it: {_describe(section, first['loc'])}") from None
        if first["type"] == "value_error":  # of our own validators: problem; remedy
            problem, _, remedy = first["msg"].removeprefix("Value error, ").partition("; ")
            place = f"{source}: {key}" if first["loc"] else source
            way_out = f"{remedy[:1].upper()}{remedy[1:]}." if remedy else _describe(section, first["loc"])
            raise ConfigError(f"{place}: {problem}.", way_out) from None
        problem = f"{source}: {key}: {first['msg']}, found {first['input']!r}."
        raise ConfigError(problem, _describe(section, first["loc"])) from None


def load_yaml(section: type[Section], path: str | Path, overrides: Iterable[str] = ()) -> Section:
    """A section from a YAML file, with ``a.b=c`` overrides applied on top.

    Raises:
        ConfigError: the file is missing, is no YAML mapping, or :func:`parse` refuses its values.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}).", "Give the path of a YAML file.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text.", "Give the path of a YAML file.") from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not valid YAML: {error}.", "Correct the line it names.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds no settings.", "A run file starts with 'model:', 'public:' and 'tenants:'.")
    return parse(section, override(values, overrides), str(path))


def override(values: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of ``values`` with each ``a.b=c`` set; list entries are reached by index (``tenants.0.name=x``).

    Raises:
        ConfigError: an override has no ``=``, or leads through something that is no section.
    """
    result = yaml.safe_load(yaml.safe_dump(values)) if values else {}
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise ConfigError(
                f"--set {item}: expected key=value.",
                "Give a key of docs/configuration.md a value: --set section.key=5e-5.",
            )
        place: Any = result
        *path, last = key.split(".")
        for part in path:
            place = _enter(place, part, key)
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"--set {key}: {text!r} is not valid YAML.", "Put quotes around it.") from None
        if isinstance(place, list):
            place[_index(place, last, key)] = value
        elif isinstance(place, dict):
            place[last] = value
        else:
            raise ConfigError(f"--set {key}: there is no section to set {last!r} in.", "Check the dotted path.")
    return result


def _enter(place: Any, part: str, key: str) -> Any:
    if isinstance(place, list):
        return place[_index(place, part, key)]
    if isinstance(place, dict):
        if place.get(part) is None:
            place[part] = {}
        return place[part]
    raise ConfigError(f"--set {key}: {part!r} is not a section.", "Check the dotted path.")


def _index(place: list[Any], part: str, key: str) -> int:
    if part.isdigit() and int(part) < len(place):
        return int(part)
    raise ConfigError(f"--set {key}: {part!r} is no entry of a list of {len(place)}.", "Entries count from 0.")


def _section_at(section: type[BaseModel], location: Iterable[int | str]) -> type[BaseModel]:
    for part in location:
        if isinstance(part, int) or part not in section.model_fields:
            continue
        inner = _settings_inside(section.model_fields[part].annotation)
        if inner is not None:
            section = inner
    return section


def _settings_inside(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _settings_inside(argument)
        if found is not None:
            return found
    return None


def _known_keys(section: type[BaseModel], location: Iterable[int | str]) -> list[str]:
    return list(_section_at(section, location).model_fields)


def _describe(section: type[BaseModel], location: tuple[int | str, ...]) -> str:
    names = [part for part in location if isinstance(part, str)]
    if not names:
        return "Correct it."
    field = _section_at(section, location[:-1]).model_fields.get(names[-1])
    if field is None or not field.description:
        return f"Correct {names[-1]!r}."
    return f"{names[-1]}: {field.description}."
