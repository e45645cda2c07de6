"""`--set path=value` on a job file."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetune import tomltext
from fleetune.coordinator import overrides
from fleetune.errors import ConfigError

JOB = """\
# why this job
name = "intents"
seed = 3

[task]
labels = ["on", "off \\"now\\"", "ä"]

[lora]
alpha = 16.0
rank = 8
"""


def test_without_settings_the_file_stays_as_it_is() -> None:
    assert overrides.apply(JOB, []) == JOB


def test_settings_are_replaced_added_and_typed_and_the_rest_stays() -> None:
    text = overrides.apply(JOB, ["lora.rank=4", "name=trial-2", "rounds.quorum=0.5", "model.allow_hub=false", 'lora.targets=["query"]'])
    assert tomltext.parse(text) == {
        "name": "trial-2",
        "seed": 3,
        "task": {"labels": ["on", 'off "now"', "ä"]},
        "lora": {"alpha": 16.0, "rank": 4, "targets": ["query"]},
        "rounds": {"quorum": 0.5},
        "model": {"allow_hub": False},
    }


def test_a_value_with_equal_signs_and_spaces_is_a_text() -> None:
    assert tomltext.parse(overrides.apply(JOB, ["name = a=b c"]))["name"] == "a=b c"


@pytest.mark.parametrize("setting", ["rank", "=3", "lora.=3", "a.b.c=3", "seed.x=3"])
def test_what_is_no_path_and_value_is_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        overrides.apply(JOB, [setting])


@given(st.text())
def test_any_text_survives(text: str) -> None:
    document = tomltext.parse(overrides.apply(f"[a]\nb = {_quoted(text)}\n", ["c=1"])) if _sayable(text) else {"a": {"b": text}}
    assert document["a"] == {"b": text}


def _sayable(text: str) -> bool:
    return all(letter.isprintable() for letter in text)


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
