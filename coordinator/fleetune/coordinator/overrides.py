"""`--set path=value` on a job file: the text with some settings replaced."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import cast

from fleetune import tomltext
from fleetune.errors import ConfigError


def apply(job_toml: str, settings: Sequence[str]) -> str:
    """The job file with each "section.name=value" in place; unchanged, comments included, where there is none.

    A value is read as TOML ("3", "0.1", "true", '["a", "b"]') and taken as a text where it is no TOML, so that names need
    no quotes. Whether path and value are allowed is the job file's own check. Raises ConfigError or tomltext.TomlError.
    """
    if not settings:
        return job_toml
    document = tomltext.parse(job_toml)
    for setting in settings:
        path, equals, value = setting.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys) or len(keys) > 2:
            raise ConfigError(f"--set {setting!r} is not PATH=VALUE.", "Write for example --set rounds.count=3 or --set name=trial.")
        table = document
        for key in keys[:-1]:
            inner: object = table.setdefault(key, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"--set {setting!r}: {key} is no section.", "Name a section and a setting, for example rounds.count=3.")
            table = cast("dict[str, object]", inner)
        table[keys[-1]] = _value(value.strip())
    return _toml(document)


def _value(text: str) -> object:
    try:
        return tomltext.parse(f"value = {text}")["value"]
    except tomltext.TomlError:
        return text


def _toml(document: Mapping[str, object]) -> str:
    """TOML of scalars, arrays of scalars and one level of sections: all that a job file has."""
    lines = [f"{_key(key)} = {_written(value)}" for key, value in document.items() if not isinstance(value, dict)]
    for key, value in document.items():
        if isinstance(value, dict):
            section = cast("dict[str, object]", value)
            lines += ["", f"[{_key(key)}]", *(f"{_key(name)} = {_written(item)}" for name, item in section.items())]
    return "\n".join(lines) + "\n"


def _key(key: str) -> str:
    return key if key.isascii() and key.replace("_", "").replace("-", "").isalnum() else json.dumps(key)


def _written(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        # A JSON string is a TOML basic string, except for DEL.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        items = cast("Sequence[object]", value)
        return "[" + ", ".join(_written(item) for item in items) + "]"
    if isinstance(value, dict):
        inner = cast("dict[str, object]", value)
        return "{ " + ", ".join(f"{_key(name)} = {_written(item)}" for name, item in inner.items()) + " }"
    # Dates and times: their ISO form is TOML.
    return str(value)
