"""TOML text to a plain dictionary, with every way it can be wrong as one error that says the line."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from fleetune.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TEXT_CHARACTERS_MAX = 1 << 20
"""Nobody writes a megabyte of settings by hand; parsing one would stall a daemon."""

_PLACE = re.compile(r"\s*\(at (?:line (\d+), column (\d+)|end of document)\)$")


class TomlError(ConfigError):
    """Text that is not TOML; `line` and `column` count from 1 and are 0 where the text simply ends too early."""

    def __init__(self, reason: str, line: int, column: int) -> None:
        self.reason = reason
        self.line = line
        self.column = column
        place = f"line {line}, column {column}" if line else "the end"
        super().__init__(f"not valid TOML at {place}: {reason}.")


def parse(text: str) -> dict[str, object]:
    """The document as dictionaries, lists and scalars. Raises TomlError and nothing else."""
    if len(text) > TEXT_CHARACTERS_MAX:
        raise TomlError(f"the text has {len(text)} characters, at most {TEXT_CHARACTERS_MAX} are read", 1, 1)
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _toml_error(str(error)) from error
    except (ValueError, OverflowError) as error:
        # A number of thousands of digits, or a date that no calendar has.
        raise TomlError(str(error).partition(";")[0], 0, 0) from error
    except RecursionError as error:
        raise TomlError("arrays or tables are nested too deep", 0, 0) from error


def read(path: Path) -> dict[str, object]:
    """The document in a file. Raises TomlError where it is no UTF-8 TOML, OSError where it cannot be read."""
    try:
        return parse(path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise TomlError("the file is not UTF-8 text", 0, 0) from error


def table(value: object) -> dict[str, object] | None:
    """The value as the table it is; None for anything else. TOML's keys are texts."""
    return cast("dict[str, object]", value) if isinstance(value, dict) else None


def array(value: object) -> Sequence[object] | None:
    """The value as the array it is; None for anything else."""
    return cast("Sequence[object]", value) if isinstance(value, (list, tuple)) else None


def _toml_error(message: str) -> TomlError:
    place = _PLACE.search(message)
    if place is None:
        return TomlError(message, 0, 0)
    line, column = place.group(1), place.group(2)
    reason = message[: place.start()]
    return TomlError(reason, int(line), int(column)) if line and column else TomlError(reason, 0, 0)
