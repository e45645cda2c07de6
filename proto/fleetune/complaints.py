"""What is wrong with a file of settings: complaints that name the thing, its value, the allowed and the remedy."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fleetune import tomltext
from fleetune.errors import ConfigError

SHOWN_CHARACTERS_MAX = 80
"""A complaint quotes a value so that it is found again, not in full."""


@dataclass(frozen=True)
class Complaint:
    """One thing wrong.

    `path` is dotted, for example "lora.rank"; `value` is what was found, as text, empty where it is missing.
    """

    path: str
    value: str
    allowed: str
    remedy: str

    def sentence(self) -> str:
        """For a person, on one line."""
        found = f" = {self.value}" if self.value else ""
        allowed = f" (allowed: {self.allowed})" if self.allowed else ""
        return f"{self.path or 'the file'}{found}{allowed}: {self.remedy}"


class ComplaintsError(ConfigError):
    """A file of settings cannot be used; `complaints` holds every reason, never only the first."""

    def __init__(self, subject: str, complaints: Sequence[Complaint]) -> None:
        self.subject = subject
        self.complaints = list(complaints)
        count = len(self.complaints)
        lines = "".join(f"\n  {complaint.sentence()}" for complaint in self.complaints)
        super().__init__(f"{subject} has {count} mistake{'' if count == 1 else 's'}:{lines}")


def shown(value: object) -> str:
    """A value as TOML would write it, on one line and shortened; nested values only by their size."""
    if isinstance(value, str):
        # Left as they are, direction marks and terminal codes would rewrite the complaint around them.
        text = "".join(
            c if c.isprintable() else f"\\u{ord(c):04x}" for c in json.dumps(value[: 2 * SHOWN_CHARACTERS_MAX], ensure_ascii=False)
        )
    elif isinstance(value, bool):
        text = "true" if value else "false"
    elif isinstance(value, int):
        # str() of an int of thousands of digits raises ValueError.
        text = str(value) if value.bit_length() < 256 else f"a whole number of {value.bit_length()} bits"
    elif tomltext.table(value) is not None:
        text = "a table" if value else "{}"
    elif (items := tomltext.array(value)) is not None:
        plain = all(isinstance(item, (str, int, float)) for item in items)
        text = "[" + ", ".join(shown(item) for item in items[:20]) + "]" if plain else f"an array of {len(items)}"
    else:
        text = str(value)
    return text if len(text) <= SHOWN_CHARACTERS_MAX else text[: SHOWN_CHARACTERS_MAX - 1] + "…"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The known name that is nearest to `word`, or "" where none is near."""
    # SequenceMatcher is quadratic: a name of a megabyte is nobody's slip of the pen.
    near = difflib.get_close_matches(word[:64], list(known), n=1, cutoff=0.6)
    return near[0] if near else ""
